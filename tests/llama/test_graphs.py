from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sphinxkit.errors import ShapeError
from sphinxkit.llama import DecodeGraphs, KVCache, LlamaModel

# float32 sums in another order: 1e-7 of logits of about 3, over two layers
LOGITS_TOLERANCE = 1e-5

Builder = Callable[..., LlamaModel]


class Rehearsed:
    """Stands in for a CUDA graph: rehearses as a capture does, and replays what was recorded by calling it."""

    def __init__(self) -> None:
        self.recordings = 0
        self.replays = 0

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.recordings += 1
        for _ in range(3):
            run()

        def replay() -> Tensor:
            self.replays += 1
            return run()

        return replay


@pytest.fixture
def model(small_llama: Builder) -> LlamaModel:
    return small_llama().requires_grad_(False)


def prefilled(model: LlamaModel, lengths: list[int], capacity: int = 64, static: bool = True) -> KVCache:
    cache = KVCache(2, len(lengths), capacity, 2, 8, static_shapes=static)
    ids = torch.randint(0, 61, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    model(model.embed(ids), cache=cache, lengths=lengths)
    return cache


def tokens_of(step: int, rows: int) -> Tensor:
    return (torch.arange(rows)[:, None] * 7 + step * 5) % 61


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=LOGITS_TOLERANCE, rtol=0)


def test_steps_are_those_of_the_model_while_rows_leave(model: LlamaModel) -> None:
    recorder = Rehearsed()
    graphs = DecodeGraphs(model, recorder)
    cache, plain = (prefilled(model, [5, 2, 9]) for _ in range(2))
    for step in range(4):
        close(graphs(tokens_of(step, 3), cache), model(model.embed(tokens_of(step, 3)), cache=plain))
        assert cache.lengths.tolist() == plain.lengths.tolist()
    assert (recorder.recordings, recorder.replays) == (1, 3)
    for kept in (cache, plain):
        kept.keep_rows([0, 2])
    for step in range(3):
        close(graphs(tokens_of(step, 2), cache), model(model.embed(tokens_of(step, 2)), cache=plain))
    assert (recorder.recordings, recorder.replays) == (2, 5)
    other, plain = (prefilled(model, [3]) for _ in range(2))
    for step in range(2):
        close(graphs(tokens_of(step, 1), other), model(model.embed(tokens_of(step, 1)), cache=plain))
    assert recorder.recordings == 3


def test_a_row_is_filled_to_its_end_and_no_further(model: LlamaModel) -> None:
    graphs = DecodeGraphs(model, Rehearsed())
    cache, plain = (prefilled(model, [3], capacity=9) for _ in range(2))
    for step in range(6):
        close(graphs(tokens_of(step, 1), cache), model(model.embed(tokens_of(step, 1)), cache=plain))
    assert cache.lengths.tolist() == [9]
    with pytest.raises(ShapeError, match="row 0 holds 9 tokens and 1 more make 10, but its capacity is 9"):
        graphs(tokens_of(0, 1), cache)
    assert cache.lengths.tolist() == [9]


def test_without_room_to_rehearse_it_stays_eager(model: LlamaModel) -> None:
    recorder = Rehearsed()
    graphs = DecodeGraphs(model, recorder)
    cache, plain = (prefilled(model, [5], capacity=8) for _ in range(2))
    for step in range(3):
        close(graphs(tokens_of(step, 1), cache), model(model.embed(tokens_of(step, 1)), cache=plain))
    assert recorder.recordings == 0


def test_an_emptied_cache_is_replayed_from_the_start(model: LlamaModel) -> None:
    graphs = DecodeGraphs(model, Rehearsed())
    cache = prefilled(model, [5])
    for step in range(3):
        graphs(tokens_of(step, 1), cache)
    cache.reset()
    plain = KVCache(2, 1, 64, 2, 8, static_shapes=True)
    for step in range(3):
        close(graphs(tokens_of(step, 1), cache), model(model.embed(tokens_of(step, 1)), cache=plain))


def test_a_rehearsal_leaves_the_cache_as_it_was(model: LlamaModel) -> None:
    cache, untouched = (prefilled(model, [5, 2]) for _ in range(2))
    with cache.rehearsal():
        for step in range(3):
            model(model.embed(tokens_of(step, 2)), cache=cache)
    assert cache.lengths.tolist() == [5, 2]
    close(model(model.embed(tokens_of(1, 2)), cache=cache), model(model.embed(tokens_of(1, 2)), cache=untouched))


def test_decode_is_a_forward_step_with_and_without_graphs(model: LlamaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Rehearsed()
    monkeypatch.setattr("sphinxkit.llama.graphs._record_cuda_graph", recorder)
    plain, without, cache = (prefilled(model, [4, 6]) for _ in range(3))
    for step in range(3):
        expected = model(model.embed(tokens_of(step, 2)), cache=plain)
        model.use_cuda_graphs(False)
        close(model.decode(tokens_of(step, 2), without), expected)
    model.use_cuda_graphs()
    for step in range(3):
        got = model.decode(tokens_of(step, 2), cache)
    close(got, expected)
    assert recorder.replays == 2
    model.to(torch.float64)  # moves the weights: what was recorded is forgotten
    model.decode(tokens_of(4, 2), prefilled(model.float(), [4, 6]))
    assert recorder.replays == 2


def test_what_does_not_fit_is_refused(model: LlamaModel) -> None:
    graphs = DecodeGraphs(model, Rehearsed())
    with pytest.raises(ShapeError, match="need a cache with static shapes"):
        graphs(tokens_of(0, 1), prefilled(model, [3], static=False))
    with pytest.raises(ShapeError, match=r"expected token ids \(2, 1\), got \(1, 1\)"):
        graphs(tokens_of(0, 1), prefilled(model, [3, 3]))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sdpa", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_cuda_graphs_give_what_the_kernels_give(small_llama: Builder, name: str, dtype: torch.dtype) -> None:
    model = small_llama(attention=name).requires_grad_(False).to("cuda", dtype)
    model.fuse()
    graphs = DecodeGraphs(model)
    ids = torch.randint(0, 61, (3, 9), device="cuda")
    caches = [model.make_cache(3) for _ in range(2)]
    for cache in caches:
        model(model.embed(ids), cache=cache, lengths=[9, 4, 1])
    for step in range(6):
        if step == 3:
            for cache in caches:
                cache.keep_rows([0, 2])
        tokens = tokens_of(step, caches[0].batch_size).cuda()
        expected = model(model.embed(tokens), cache=caches[1])
        # the same kernels on the same numbers
        torch.testing.assert_close(graphs(tokens, caches[0]), expected, atol=LOGITS_TOLERANCE, rtol=0)
    assert caches[0].lengths.tolist() == caches[1].lengths.tolist()
