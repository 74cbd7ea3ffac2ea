from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sphinxkit.errors import DataError
from sphinxkit.generation import ContinuousBatch, Row, Sampling
from sphinxkit.llama import KVCache, llama


def rows_of(tokenizer, scripted, texts: list[str], **options) -> tuple[ContinuousBatch, list[Row], object]:
    scripts = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    llm = scripted(scripts, tokenizer.vocab_size)
    return ContinuousBatch(llm, **options), [Row(tokenizer, Sampling(), 50) for _ in texts], llm


def prompt(script: int, length: int = 3) -> torch.Tensor:
    return torch.full((length, 1), float(script))


def test_rows_join_and_leave_a_running_batch(tokenizer, scripted) -> None:
    texts = ["one", "There is a red square on a grey background.", "two three", "It is blue.", "a long answer, again"]
    batch, rows, llm = rows_of(tokenizer, scripted, texts)
    waiting = list(enumerate(rows))
    finished = []
    while waiting or len(batch):
        while waiting and len(batch) < 2:
            index, row = waiting.pop(0)
            batch.add(row, prompt(index, 3 + index))
        finished += batch.step()
    assert {id(row) for row in finished} == {id(row) for row in rows}
    assert [row.result().text for row in rows] == texts
    assert max(size for size, _ in llm.passes) == 2
    # no pass but the last row's own is smaller than the batch while rows wait, and none has a finished row in it
    decoded = sum(size for size, width in llm.passes if width == 1)
    assert decoded == sum(len(row.written) - 1 for row in rows)


def test_a_wider_batch_and_longer_rows_make_the_cache_grow(tokenizer, scripted) -> None:
    texts = ["There is a red square on a grey background.", "two three", "It is blue."]
    batch, rows, _ = rows_of(tokenizer, scripted, texts, capacity_multiple=16)
    batch.add(rows[0], prompt(0))
    for _ in range(3):
        batch.step()
    batch.add(rows[1], prompt(1, 20))
    batch.step()
    batch.add(rows[2], prompt(2, 31))
    while len(batch):
        batch.step()
    assert [row.result().text for row in rows] == texts


def test_a_given_cache_is_gone_on_with(tokenizer, scripted) -> None:
    cache = KVCache(1, 1, 60, 1, 1)
    batch, rows, _ = rows_of(tokenizer, scripted, ["one", "two"], cache=cache)
    batch.add(rows[0], prompt(0))
    while len(batch):
        batch.step()
    assert int(cache.lengths[0]) == 3 + len(rows[0].written) - 1
    batch.add(rows[1], prompt(1))  # only the first row goes on from what a cache holds
    batch.step()
    assert int(cache.lengths[0]) == 3


def test_static_shapes_give_the_same_tokens(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout that CUDA has: rows join, leave, grow and draft in it as on a CPU, steps replayed or not."""
    llm = llama(vocab_size=tokenizer.vocab_size, embed_dim=32, num_layers=2, num_heads=2, hidden_dim=64, max_seq_len=90)
    llm.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        llm.lm_head.weight *= 20  # far from ties
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, tokenizer.vocab_size, (length,), generator=generator) for length in (9, 30, 4, 17, 30)]

    def run(static: bool, at_once: int, num_draft_tokens: int | None) -> list[list[int]]:
        make_cache = type(llm).make_cache

        def make(batch_size: int, max_seq_len: int | None = None) -> KVCache:
            made = make_cache(llm, batch_size, max_seq_len)
            return KVCache(
                made.num_layers, batch_size, made.max_seq_len, made.num_kv_heads, made.head_dim, static_shapes=static
            )

        llm.make_cache = make  # type: ignore[method-assign]
        try:
            batch = ContinuousBatch(llm)
            rows = [
                Row(tokenizer, Sampling(), 12 + index, prompt_ids=ids.tolist(), num_draft_tokens=num_draft_tokens)
                for index, ids in enumerate(prompts)
            ]
            waiting = list(zip(rows, prompts, strict=True))
            while waiting or len(batch):
                while waiting and len(batch) < at_once:
                    row, ids = waiting.pop(0)
                    batch.add(row, llm.embed(ids).detach())
                batch.step()
            return [row.written for row in rows]
        finally:
            del llm.make_cache

    expected = run(False, 1, None)
    for static, at_once, num_draft_tokens in (
        (False, 5, None),
        (False, 2, 3),
        (True, 1, None),
        (True, 2, None),
        (True, 3, 4),
    ):
        assert run(static, at_once, num_draft_tokens) == expected
    replays: list[int] = []

    def record(step):  # in place of a CUDA graph
        step()

        def replay():
            replays.append(1)
            return step()

        return replay

    monkeypatch.setattr("sphinxkit.llama.graphs._record_cuda_graph", record)
    llm.use_cuda_graphs()
    for at_once, num_draft_tokens in ((1, None), (2, None), (5, None), (3, 4)):
        assert run(True, at_once, num_draft_tokens) == expected
    assert len(replays) > 50


class Crossings(TorchDispatchMode):
    """Counts, below Python: numbers taken from tensors one by one, and tensors made of what the host knows."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        kwargs = kwargs or {}
        moves = name == "_to_copy" and kwargs.get("device") is not None
        if moves or name in ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "lift_fresh"):
            self.found[name] += 1
        return func(*args, **kwargs)


@pytest.mark.parametrize("chunk", [1, 5])
def test_a_step_waits_for_the_device_once(tokenizer, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """With the cache's static shapes, which CUDA has, every way from a tensor to a number is counted.

    So are tensors made of the host's numbers, each of which is copied to the device: a chunk has one for the rows that
    are sampled, whatever its length.
    """
    llm = llama(vocab_size=tokenizer.vocab_size, embed_dim=32, num_layers=1, num_heads=2, hidden_dim=64, max_seq_len=90)
    llm.init_weights(torch.Generator().manual_seed(0))
    cache = llm.make_cache(2, 80)
    cache = KVCache(1, 2, 80, cache.num_kv_heads, cache.head_dim, dtype=torch.float32, static_shapes=True)
    monkeypatch.setattr(llm, "make_cache", lambda *sizes: cache)
    batch, rows = ContinuousBatch(llm, chunk=chunk), []
    for seed, length in enumerate((5, 5)):
        row = Row(tokenizer, Sampling(temperature=float(seed), stop=("\n###",), seed=seed), 60)
        rows.append(row)
        batch.add(row, torch.zeros(length, 32))
    batch.step()
    batch.step()
    waits: list[str] = []

    def count(name: str) -> None:
        real = getattr(torch.Tensor, name)

        def counting(self, *arguments):
            waits.append(name)
            return real(self, *arguments)

        monkeypatch.setattr(torch.Tensor, name, counting)

    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy", "nonzero"):
        count(name)
    written = [len(row.written) for row in rows]
    with Crossings() as crossings:
        for _ in range(4):
            batch.step()
    assert [len(row.written) for row in rows] == [count + 4 * chunk for count in written]
    assert waits == ["tolist"] * 4
    assert crossings.found == {"lift_fresh": 4}


def test_chunks_change_nothing_but_the_number_of_waits(tokenizer) -> None:
    """Rows end, by their budget and by a stop string, inside of chunks; sampled ones draw the same numbers."""
    llm = llama(vocab_size=tokenizer.vocab_size, embed_dim=32, num_layers=1, num_heads=2, hidden_dim=64, max_seq_len=90)
    llm.init_weights(torch.Generator().manual_seed(0))
    prompts = torch.randn(3, 20, 32, generator=torch.Generator().manual_seed(1))

    def run(chunk: int | None) -> list[tuple[list[int], str | None]]:
        batch = ContinuousBatch(llm, chunk=chunk)
        rows = []
        for seed, (length, budget) in enumerate(((5, 30), (20, 11), (9, 50))):
            sampling = Sampling(temperature=[0.0, 1.0, 2.0][seed], top_p=0.9, stop=("e",) * (seed > 0), seed=seed)
            rows.append(Row(tokenizer, sampling, budget))
            batch.add(rows[-1], prompts[seed, :length])
        while len(batch):
            batch.step()
        return [(row.token_ids, row.finish_reason) for row in rows]

    expected = run(1)
    assert {reason for _, reason in expected} >= {"length", "stop"}
    for chunk in (None, 2, 7, 1000):
        assert run(chunk) == expected
    with pytest.raises(DataError, match="chunk must be at least 1 pass, or None; got 0"):
        ContinuousBatch(llm, chunk=0)


@pytest.mark.gpu
def test_joining_leaving_and_drafting_on_a_gpu(tokenizer) -> None:
    llm = llama(vocab_size=tokenizer.vocab_size, embed_dim=64, num_layers=2, num_heads=2, hidden_dim=64, max_seq_len=90)
    llm.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        llm.lm_head.weight *= 20  # far from ties
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, tokenizer.vocab_size, (length,), generator=generator) for length in (9, 30, 4, 17, 30)]

    def run(device: str, at_once: int, num_draft_tokens: int | None) -> list[list[int]]:
        llm.to(device)
        batch = ContinuousBatch(llm)
        rows = [
            Row(tokenizer, Sampling(), 12, prompt_ids=ids.tolist(), num_draft_tokens=num_draft_tokens)
            for ids in prompts
        ]
        waiting = list(zip(rows, prompts, strict=True))
        while waiting or len(batch):
            while waiting and len(batch) < at_once:
                row, ids = waiting.pop(0)
                batch.add(row, llm.embed(ids.to(device)).detach())
            batch.step()
        return [row.written for row in rows]

    expected = run("cpu", 1, None)
    for at_once, num_draft_tokens in ((1, None), (2, None), (5, None), (3, 4)):
        assert run("cuda", at_once, num_draft_tokens) == expected
