from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sphinxkit.errors import DataError
from sphinxkit.generation import ContinuousBatch, GeneratedSequence, Sampling
from sphinxkit.llama import KVCache, llama


def batch_of(tokenizer, scripted, texts: list[str], **options) -> tuple[ContinuousBatch, object]:
    scripts = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    llm = scripted(scripts, tokenizer.vocab_size)
    return ContinuousBatch(llm, tokenizer, **options), llm


def texts_of(sequences: list[GeneratedSequence]) -> list[str]:
    return [sequence.result().text for sequence in sequences]


SHORT = Sampling(max_new_tokens=50)


def prompt(script: int, length: int = 3) -> torch.Tensor:
    return torch.full((length, 1), float(script))


def test_sequences_join_and_leave_a_running_batch(tokenizer, scripted) -> None:
    texts = ["one", "There is a red square on a grey background.", "two three", "It is blue.", "a long answer, again"]
    batch, llm = batch_of(tokenizer, scripted, texts)
    waiting = list(range(len(texts)))
    sequences, finished = [], []
    while waiting or len(batch):
        while waiting and len(batch) < 2:
            index = waiting.pop(0)
            sequences.append(batch.add(prompt(index, 3 + index), SHORT))
        finished += batch.step()
    assert {id(sequence) for sequence in finished} == {id(sequence) for sequence in sequences}
    assert texts_of(sequences) == texts
    assert max(size for size, _ in llm.passes) == 2
    # no pass but the last sequence's own is smaller than the batch while prompts wait, and none has a finished row
    decoded = sum(size for size, width in llm.passes if width == 1)
    assert decoded == sum(len(sequence.generated_ids) - 1 for sequence in sequences)


def test_a_wider_batch_and_longer_sequences_make_the_cache_grow(tokenizer, scripted) -> None:
    texts = ["There is a red square on a grey background.", "two three", "It is blue."]
    batch, _ = batch_of(tokenizer, scripted, texts, capacity_multiple=16)
    sequences = [batch.add(prompt(0), SHORT)]
    for _ in range(3):
        batch.step()
    sequences.append(batch.add(prompt(1, 20), SHORT))
    batch.step()
    sequences.append(batch.add(prompt(2, 31), SHORT))
    while len(batch):
        batch.step()
    assert texts_of(sequences) == texts


def test_finished_sequences_need_no_room_in_a_grown_cache(tokenizer, scripted) -> None:
    """A long sequence ends while a short one runs; the cache that both wait for then is shorter than the long one."""
    texts = ["one", "There is a red square on a grey background.", "two three", "It is blue.", "a long answer, again"]
    batch, _ = batch_of(tokenizer, scripted, texts)
    sequences = [
        batch.add(prompt(0, 60), Sampling(max_new_tokens=1)),
        batch.add(prompt(1), Sampling(max_new_tokens=40)),
    ]
    batch.step()
    assert sequences[0].finish_reason == "length"
    sequences += [batch.add(prompt(index), Sampling(max_new_tokens=20)) for index in (2, 3, 4)]
    while len(batch):
        batch.step()
    assert texts_of(sequences)[1:] == texts[1:]


def test_a_given_cache_is_continued(tokenizer, scripted) -> None:
    cache = KVCache(1, 1, 60, 1, 1)
    batch, llm = batch_of(tokenizer, scripted, ["one", "two"], cache=cache)
    first = batch.add(prompt(0), SHORT)
    while len(batch):
        batch.step()
    assert batch.cache is cache
    held = int(cache.lengths[0])
    assert held == 3 + len(first.generated_ids) - 1
    cache.lengths.fill_(3)
    again = ContinuousBatch(llm, tokenizer, cache=cache, capacity_multiple=32)
    with pytest.raises(DataError, match="context holds 100"):
        again.add(prompt(0, 97), SHORT, num_cached=3)
    longer = again.add(prompt(0, 20), Sampling(max_new_tokens=70), num_cached=3)  # more than the cache has room for
    with pytest.raises(DataError, match="must be alone"):
        again.add(prompt(1), SHORT)
    again.step()
    assert again.cache is not None
    assert again.cache is not cache
    assert (again.cache.max_seq_len, int(again.cache.lengths[0])) == (96, 23)
    assert len(longer.generated_ids) == 1
    with pytest.raises(DataError, match="must be alone"):
        again.add(prompt(1), SHORT, num_cached=3)
    with pytest.raises(DataError, match="must be alone"):
        ContinuousBatch(llm, tokenizer).add(prompt(1), SHORT, num_cached=3)


def test_static_shapes_give_the_same_tokens(tokenizer) -> None:
    """The layout that CUDA has: rows join, leave, grow and draft in it as on a CPU."""
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
            batch, sequences = ContinuousBatch(llm, tokenizer), []
            waiting = list(enumerate(prompts))
            while waiting or len(batch):
                while waiting and len(batch) < at_once:
                    index, ids = waiting.pop(0)
                    sequence = batch.add(
                        llm.embed(ids).detach(),
                        Sampling(max_new_tokens=12 + index),
                        prompt_ids=ids.tolist(),
                        num_draft_tokens=num_draft_tokens,
                    )
                    sequences.append(sequence)
                batch.step()
            return [sequence.generated_ids for sequence in sequences]
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


@pytest.mark.parametrize("is_static", [False, True])
def test_a_failed_sequence_leaves_nothing_to_later_ones(tokenizer, is_static: bool) -> None:
    """NaN in a cache's slots would reach a later row through their masked weight: 0 times NaN is NaN."""
    llm = llama(vocab_size=tokenizer.vocab_size, embed_dim=32, num_layers=2, num_heads=2, hidden_dim=64, max_seq_len=90)
    llm.init_weights(torch.Generator().manual_seed(0))
    embeds = llm.embed(torch.arange(3, 60)).detach()
    prompts = [embeds[:40], embeds[:9], embeds[5:20], embeds[3:10]]
    prompts.insert(1, torch.full((50, 32), torch.nan))
    prompts.insert(3, torch.full((30, 32), torch.nan))

    def run(at_once: int) -> list[list[int] | None]:
        made = llm.make_cache(1)
        sizes = (made.max_seq_len, made.num_kv_heads, made.head_dim)
        batch = ContinuousBatch(llm, tokenizer)
        batch.cache, batch._slots = KVCache(made.num_layers, at_once, *sizes, static_shapes=is_static), [None] * at_once
        waiting, sequences = list(prompts), []
        while waiting or len(batch):
            while waiting and len(batch) < at_once:
                sequences.append(batch.add(waiting.pop(0), Sampling(max_new_tokens=8)))
            batch.step()
        return [None if each.finish_reason == "error" else each.generated_ids for each in sequences]

    alone = run(1)
    assert [tokens is None for tokens in alone] == [False, True, False, True, False, False]
    for at_once in (2, 3):
        assert run(at_once) == alone


@pytest.mark.parametrize("num_passes", [1, 5])
def test_a_step_waits_for_the_device_once(tokenizer, monkeypatch: pytest.MonkeyPatch, num_passes: int) -> None:
    """With the cache's static shapes, which CUDA has, every way from a tensor to a number is counted.

    So are tensors made of the host's numbers, each of which is copied to the device: a step has one for the sequences
    that are sampled, whatever its number of passes.
    """
    llm = llama(vocab_size=tokenizer.vocab_size, embed_dim=32, num_layers=1, num_heads=2, hidden_dim=64, max_seq_len=90)
    llm.init_weights(torch.Generator().manual_seed(0))
    cache = llm.make_cache(2, 80)
    cache = KVCache(1, 2, 80, cache.num_kv_heads, cache.head_dim, dtype=torch.float32, static_shapes=True)
    monkeypatch.setattr(llm, "make_cache", lambda *sizes: cache)
    batch, sequences = ContinuousBatch(llm, tokenizer, passes_per_step=num_passes), []
    for seed, length in enumerate((5, 5)):
        sampling = Sampling(max_new_tokens=60, temperature=float(seed), stop=("\n###",), seed=seed)
        sequences.append(batch.add(torch.zeros(length, 32), sampling))
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
    written = [len(sequence.generated_ids) for sequence in sequences]
    with Crossings() as crossings:
        for _ in range(4):
            batch.step()
    assert [len(sequence.generated_ids) for sequence in sequences] == [count + 4 * num_passes for count in written]
    assert waits == ["tolist"] * 4
    assert crossings.found == {"lift_fresh": 4}


def test_passes_per_step_change_nothing_but_the_number_of_waits(tokenizer) -> None:
    """Sequences end, by their length and by a stop string, inside of a step; sampled ones draw the same numbers."""
    llm = llama(vocab_size=tokenizer.vocab_size, embed_dim=32, num_layers=1, num_heads=2, hidden_dim=64, max_seq_len=90)
    llm.init_weights(torch.Generator().manual_seed(0))
    prompts = torch.randn(3, 20, 32, generator=torch.Generator().manual_seed(1))

    def run(num_passes: int | None) -> list[tuple[list[int], str | None]]:
        batch = ContinuousBatch(llm, tokenizer, passes_per_step=num_passes)
        sequences = []
        for seed, (length, num_new) in enumerate(((5, 30), (20, 11), (9, 50))):
            sampling = Sampling(num_new, [0.0, 1.0, 2.0][seed], top_p=0.9, stop=("e",) * (seed > 0), seed=seed)
            sequences.append(batch.add(prompts[seed, :length], sampling))
        while len(batch):
            batch.step()
        return [(sequence.token_ids, sequence.finish_reason) for sequence in sequences]

    expected = run(1)
    assert {reason for _, reason in expected} >= {"length", "stop"}
    for num_passes in (None, 2, 7, 1000):
        assert run(num_passes) == expected
    with pytest.raises(DataError, match="passes_per_step must be at least 1, or None; got 0"):
        ContinuousBatch(llm, tokenizer, passes_per_step=0)


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
        batch, sequences = ContinuousBatch(llm, tokenizer), []
        waiting = list(prompts)
        while waiting or len(batch):
            while waiting and len(batch) < at_once:
                ids = waiting.pop(0)
                sequence = batch.add(
                    llm.embed(ids.to(device)).detach(),
                    Sampling(max_new_tokens=12),
                    prompt_ids=ids.tolist(),
                    num_draft_tokens=num_draft_tokens,
                )
                sequences.append(sequence)
            batch.step()
        return [sequence.generated_ids for sequence in sequences]

    expected = run("cpu", 1, None)
    for at_once, num_draft_tokens in ((1, None), (2, None), (5, None), (3, 4)):
        assert run("cuda", at_once, num_draft_tokens) == expected
