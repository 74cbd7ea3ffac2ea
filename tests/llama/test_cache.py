from __future__ import annotations

import pytest
import torch

from sphinxkit.errors import ShapeError
from sphinxkit.llama import KVCache


def filled(lengths: list[int], *, static: bool, capacity: int = 6, width: int | None = None) -> KVCache:
    """A cache of one layer whose slot j of row i holds 10 * i + j."""
    cache = KVCache(1, len(lengths), capacity, 2, 4, static_shapes=static)
    width = max(lengths) if width is None else width
    step = cache.prepare_write(width, lengths)
    numbers = 10.0 * torch.arange(len(lengths))[:, None] + torch.arange(width)
    tokens = numbers[:, :, None, None].expand(-1, -1, 2, 4)
    cache.write(0, tokens, -tokens, step)
    cache.advance(step)
    return cache


def held(cache: KVCache, row: int) -> list[float]:
    keys, values = cache.keys[0][row], cache.values[0][row]
    length = int(cache.lengths[row])
    assert torch.equal(keys[:, :length], -values[:, :length])
    assert torch.equal(keys[:, :length], keys[:1, :length, :1].expand(2, -1, 4))
    return keys[0, :length, 0].tolist()


@pytest.mark.parametrize("static", [False, True])
def test_rows_of_different_lengths_are_kept_apart(static: bool) -> None:
    cache = filled([3, 1, 0], static=static)
    assert cache.lengths.tolist() == [3, 1, 0]
    assert [held(cache, row) for row in range(3)] == [[0, 1, 2], [10], []]
    step = cache.prepare_write(2, [1, 2, 2])
    new = torch.tensor([[3, 99], [11, 12], [20, 21]], dtype=torch.float32)[:, :, None, None].expand(-1, -1, 2, 4)
    cache.write(0, new, -new, step)
    cache.advance(step)
    assert [held(cache, row) for row in range(3)] == [[0, 1, 2, 3], [10, 11, 12], [20, 21]]
    step = cache.prepare_write(1)
    new = torch.tensor([4.0, 13.0, 22.0])[:, None, None, None].expand(-1, -1, 2, 4)
    cache.write(0, new, -new, step)
    cache.advance(step)
    assert [held(cache, row) for row in range(3)] == [[0, 1, 2, 3, 4], [10, 11, 12, 13], [20, 21, 22]]


@pytest.mark.parametrize("static", [False, True])
def test_every_layout_reads_the_same_and_xformers_needs_no_copy(static: bool) -> None:
    cache = KVCache(2, 3, 6, 2, 4, static_shapes=static)
    assert cache.num_slots == 8
    assert all(tensor.shape == (3, 2, 8, 4) for tensor in (*cache.keys, *cache.values))
    assert cache.num_bytes == 2 * 2 * 3 * 2 * 8 * 4 * 4
    if static:
        memory = cache.keys[0].transpose(1, 2)
        assert memory.view(1, 24, 2, 4).data_ptr() == cache.keys[0].data_ptr()
    else:
        assert cache.keys[0].is_contiguous()


def test_a_step_looks_no_further_than_the_longest_row_unless_shapes_are_static() -> None:
    assert filled([3, 1], static=False).prepare_write(1).num_keys == 4
    assert filled([3, 1], static=True).prepare_write(1).num_keys == 8
    assert filled([0, 0], static=False, width=2).prepare_write(1, [0, 0]).num_keys == 1


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("capacity", [6, 8])  # 8: nothing to spare but the slot that is there for this
def test_a_full_row_may_sit_beside_a_running_one(static: bool, capacity: int) -> None:
    cache = filled([capacity, 2], static=static, capacity=capacity)
    for expected in (3, 4):
        step = cache.prepare_write(1, [0, 1])
        tokens = torch.full((2, 1, 2, 4), 10.0 + expected - 1)
        cache.write(0, tokens, -tokens, step)
        cache.advance(step)
        assert cache.lengths.tolist() == [capacity, expected]
    assert held(cache, 0) == list(range(capacity))
    assert held(cache, 1) == [10, 11, 12, 13]


@pytest.mark.parametrize("static", [False, True])
def test_padding_may_stick_out_of_the_cache(static: bool) -> None:
    level = filled([5, 5], static=static)
    step = level.prepare_write(6, [1, 0])
    tokens = torch.arange(5.0, 11.0)[:, None, None].expand(2, -1, 2, 4)
    level.write(0, tokens, -tokens, step)
    level.advance(step)
    assert [held(level, row) for row in range(2)] == [[0, 1, 2, 3, 4, 5], [10, 11, 12, 13, 14]]
    cache = filled([5, 1], static=static)
    step = cache.prepare_write(5, [1, 5])
    tokens = torch.arange(5.0, 15.0).view(2, 5)[:, :, None, None].expand(-1, -1, 2, 4)
    cache.write(0, tokens, -tokens, step)
    cache.advance(step)
    assert held(cache, 0) == [0, 1, 2, 3, 4, 5]
    assert held(cache, 1) == [10, 10, 11, 12, 13, 14]


@pytest.mark.parametrize("static", [False, True])
def test_overflow_is_refused_before_anything_is_written(static: bool) -> None:
    cache = filled([3, 6], static=static)
    before = cache.keys[0].clone()
    with pytest.raises(ShapeError, match="row 1 holds 6 tokens and 1 more make 7, but its capacity is 6"):
        cache.prepare_write(1)
    with pytest.raises(ShapeError, match="row 0 holds 3 tokens and 4 more make 7, but its capacity is 6"):
        cache.prepare_write(4, torch.tensor([4, 0]))
    assert torch.equal(cache.keys[0], before)
    assert cache.lengths.tolist() == [3, 6]
    assert cache.prepare_write(3, [3, 0]).ends == (6, 6)


def test_a_static_decoding_step_does_not_read_the_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = filled([3, 1], static=True, capacity=20)

    def refuse(*_: object) -> None:
        raise RuntimeError("this would wait for the device")

    monkeypatch.setattr(torch.Tensor, "tolist", refuse)
    monkeypatch.setattr(torch.Tensor, "item", refuse)
    for _ in range(17):
        cache.advance(cache.prepare_write(1))
    with pytest.raises(RuntimeError, match="this would wait"):
        cache.prepare_write(1)  # no longer certain that it fits


@pytest.mark.parametrize("static", [False, True])
def test_lengths_that_were_raised_from_outside_are_looked_at_again(static: bool) -> None:
    cache = filled([1, 1], static=static, capacity=8)
    cache.lengths.copy_(torch.tensor([1, 7]))
    cache.lengths_changed()
    step = cache.prepare_write(1)
    assert step.ends == (2, 8)
    cache.advance(step)
    with pytest.raises(ShapeError, match="row 1 holds 8 tokens and 1 more make 9, but its capacity is 8"):
        cache.prepare_write(1)


@pytest.mark.parametrize("static", [False, True])
def test_reset_forgets_all_or_some_rows(static: bool) -> None:
    cache = filled([3, 1, 2], static=static)
    cache.reset([0, 2])
    assert cache.lengths.tolist() == [0, 1, 0]
    cache.reset()
    assert cache.lengths.tolist() == [0, 0, 0]
    assert cache.prepare_write(6).start == 0


@pytest.mark.parametrize("static", [False, True])
def test_keep_rows_drops_the_others(static: bool) -> None:
    cache = filled([3, 1, 2, 4], static=static)
    memory = cache.keys[0].data_ptr()
    cache.keep_rows(torch.tensor([1, 3]))
    assert cache.batch_size == 2
    assert cache.lengths.tolist() == [1, 4]
    assert [held(cache, row) for row in range(2)] == [[10], [30, 31, 32, 33]]
    assert cache.keys[0].data_ptr() == memory
    with pytest.raises(ShapeError, match=r"expected ascending rows between 0 and 1, got \[1, 0\]"):
        cache.keep_rows([1, 0])
    with pytest.raises(ShapeError, match=r"expected ascending rows between 0 and 1, got \[0, 2\]"):
        cache.keep_rows([0, 2])
    with pytest.raises(ShapeError, match=r"expected ascending rows between 0 and 1, got \[\]"):
        cache.keep_rows([])


def test_lengths_may_be_lowered_in_place() -> None:
    cache = filled([4, 4], static=False)
    cache.lengths.sub_(torch.tensor([1, 3]))
    assert [held(cache, row) for row in range(2)] == [[0, 1, 2], [10]]
    assert cache.prepare_write(2, [2, 0]).ends == (5, 1)


def test_a_cache_made_in_inference_mode_works_outside() -> None:
    with torch.inference_mode():
        cache = filled([1, 2], static=False)
        cache.keep_rows([1])
    cache.advance(cache.prepare_write(1))
    assert cache.lengths.tolist() == [3]


def test_device_and_dtype_are_what_was_asked_for() -> None:
    cache = KVCache(1, 1, 4, 1, 2, device="cpu", dtype=torch.bfloat16)
    assert cache.device == torch.device("cpu")
    assert cache.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["num_layers", "batch_size", "max_seq_len", "num_kv_heads", "head_dim"])
def test_sizes_must_be_positive(name: str) -> None:
    sizes = {"num_layers": 1, "batch_size": 1, "max_seq_len": 4, "num_kv_heads": 1, "head_dim": 2}
    with pytest.raises(ShapeError, match=f"{name} must be at least 1, got 0"):
        KVCache(**{**sizes, name: 0})


def test_counts_must_fit_the_rows_and_the_columns() -> None:
    cache = KVCache(1, 2, 4, 1, 2)
    with pytest.raises(ShapeError, match=r"expected 2 numbers, one per row, got \(3,\)"):
        cache.prepare_write(2, [1, 1, 1])
    with pytest.raises(ShapeError, match=r"between 0 and the 2 columns given, got \[3, 1\]"):
        cache.prepare_write(2, [3, 1])
    with pytest.raises(ShapeError, match=r"between 0 and the 2 columns given, got \[-1, 1\]"):
        cache.prepare_write(2, torch.tensor([-1, 1]))
