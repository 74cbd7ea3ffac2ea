from __future__ import annotations

import pytest
import torch

from sphinxkit.generation import Row, RunningBatch, Sampling
from sphinxkit.llama import KVCache, llama


def rows_of(tokenizer, scripted, texts: list[str], **options) -> tuple[RunningBatch, list[Row], object]:
    scripts = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    llm = scripted(scripts, tokenizer.vocab_size)
    return RunningBatch(llm, **options), [Row(tokenizer, Sampling(), 50) for _ in texts], llm


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

    def run(static: bool, at_once: int, speculate: int | None) -> list[list[int]]:
        make_cache = type(llm).make_cache

        def make(batch_size: int, max_seq_len: int | None = None) -> KVCache:
            made = make_cache(llm, batch_size, max_seq_len)
            return KVCache(
                made.num_layers, batch_size, made.max_seq_len, made.num_kv_heads, made.head_dim, static_shapes=static
            )

        llm.make_cache = make  # type: ignore[method-assign]
        try:
            batch = RunningBatch(llm)
            rows = [
                Row(tokenizer, Sampling(), 12 + index, prompt_ids=ids.tolist(), speculate=speculate)
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
    for static, at_once, speculate in ((False, 5, None), (False, 2, 3), (True, 1, None), (True, 2, None), (True, 3, 4)):
        assert run(static, at_once, speculate) == expected
    replays: list[int] = []

    def record(step):  # in place of a CUDA graph
        step()

        def replay():
            replays.append(1)
            return step()

        return replay

    monkeypatch.setattr("sphinxkit.llama.graphs._record_cuda_graph", record)
    llm.use_cuda_graphs()
    for at_once, speculate in ((1, None), (2, None), (5, None), (3, 4)):
        assert run(True, at_once, speculate) == expected
    assert len(replays) > 50


def test_a_step_waits_for_the_device_once(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the cache's static shapes, which CUDA has, every way from a tensor to a number is counted."""
    llm = llama(vocab_size=tokenizer.vocab_size, embed_dim=32, num_layers=1, num_heads=2, hidden_dim=64, max_seq_len=90)
    llm.init_weights(torch.Generator().manual_seed(0))
    cache = llm.make_cache(2, 80)
    cache = KVCache(1, 2, 80, cache.num_kv_heads, cache.head_dim, dtype=torch.float32, static_shapes=True)
    monkeypatch.setattr(llm, "make_cache", lambda *sizes: cache)
    batch = RunningBatch(llm)
    for seed, length in enumerate((5, 5)):
        row = Row(tokenizer, Sampling(temperature=float(seed), stop=("\n###",), seed=seed), 60)
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
    for _ in range(4):
        batch.step()
    assert waits == ["tolist"] * 4


@pytest.mark.gpu
def test_joining_leaving_and_drafting_on_a_gpu(tokenizer) -> None:
    llm = llama(vocab_size=tokenizer.vocab_size, embed_dim=64, num_layers=2, num_heads=2, hidden_dim=64, max_seq_len=90)
    llm.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        llm.lm_head.weight *= 20  # far from ties
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, tokenizer.vocab_size, (length,), generator=generator) for length in (9, 30, 4, 17, 30)]

    def run(device: str, at_once: int, speculate: int | None) -> list[list[int]]:
        llm.to(device)
        batch = RunningBatch(llm)
        rows = [Row(tokenizer, Sampling(), 12, prompt_ids=ids.tolist(), speculate=speculate) for ids in prompts]
        waiting = list(zip(rows, prompts, strict=True))
        while waiting or len(batch):
            while waiting and len(batch) < at_once:
                row, ids = waiting.pop(0)
                batch.add(row, llm.embed(ids.to(device)).detach())
            batch.step()
        return [row.written for row in rows]

    expected = run("cpu", 1, None)
    for at_once, speculate in ((1, None), (2, None), (5, None), (3, 4)):
        assert run("cuda", at_once, speculate) == expected
