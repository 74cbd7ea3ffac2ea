"""Greedy answers in float32 are the golden ones with every switch on or off."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sphinxkit
from sphinxkit.acceleration import CompiledAccelerator, FusedAccelerator, fused
from sphinxkit.acceleration.compiled import compiler_fault
from sphinxkit.acceleration.cpu.gemv import find_compiler
from sphinxkit.acceleration.cpu.probe import find_gemv
from sphinxkit.evaluation.parity import GoldenData
from sphinxkit.generation import ContinuousBatch, Decoder, Sampling
from sphinxkit.llama import LlamaModel, backends
from sphinxkit.sphinx_model import SphinxModel
from sphinxkit.tokenizer import Tokenizer

TINY = ["llama_ens", "llama_ens5", "llama_ens_light", "llama_ens5_light", "mixtral_sparse_ens5"]
CROSSED = TINY[0]  # all combinations; the others have the same language model behind other images
CACHES = {
    "as made": {},
    "float64": {"dtype": torch.float64},
    "static shapes": {"static_shapes": True},
    "static shapes, float64": {"static_shapes": True, "dtype": torch.float64},
}


class Question:
    """A prompt of the golden data, its embeddings with the image, and the tokens that must follow."""

    def __init__(self, ids: Sequence[int], embeds: Tensor, max_new_tokens: int, expected: list[int]) -> None:
        self.ids, self.embeds, self.max_new_tokens, self.expected = ids, embeds, max_new_tokens, expected


@functools.cache
def load(folder: Path) -> tuple[SphinxModel, list[Question]]:
    """Once for all tests: they leave the model as it was."""
    model, data = sphinxkit.load(folder), GoldenData(folder)
    questions = []
    for fact in data.facts["generate"]:
        images = fact["images"] and [data.image(name) for name in fact["images"]]
        for index, expected in enumerate(fact["single_prompt_generate_eos_only"]):
            text, image = fact["prompts"][index], images and images[index]
            visual = None if image is None else model.encode_images(model.preprocess(image))[0].detach()
            [prompt] = model.embed_prompts([text], [visual], None, fact["max_gen_len"])
            questions.append(Question(prompt.token_ids, prompt.embeds.detach(), fact["max_gen_len"], expected))
    assert len(questions) >= 4
    return model, questions


@pytest.fixture
def asked(request: pytest.FixtureRequest, golden: Path) -> tuple[SphinxModel, list[Question]]:
    return load(golden / request.param)


@pytest.fixture(params=["modules", "fused", "fused, a kernel for few rows", "eager attention"])
def llm(
    request: pytest.FixtureRequest, asked: tuple[SphinxModel, list[Question]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[LlamaModel]:
    """The language model in one of its forms."""
    model = asked[0].llm
    backend = model.attention_backend
    model.accelerator = None
    if request.param.startswith("fused"):
        if "kernel" in request.param:
            if find_compiler() is None:
                pytest.skip("there is no C compiler")
            assert find_gemv(model.norm.weight.dtype, coded=False) is not None
            monkeypatch.setattr(fused, "COMPILE_BYTES", 0)
        model.accelerator = FusedAccelerator(use_gemv="kernel" in request.param)
    elif request.param == "eager attention":
        model.attention_backend = backends.registry.build("eager")
    yield model
    model.accelerator = None
    model.attention_backend = backend


def use_caches(llm: LlamaModel, monkeypatch: pytest.MonkeyPatch, **options: object) -> None:
    """Let the model make caches of another kind."""
    made = type(llm).make_cache

    def make(batch_size: int, max_seq_len: int | None = None) -> object:
        like = made(llm, batch_size, max_seq_len)
        sizes = (like.num_layers, batch_size, like.max_seq_len, like.num_kv_heads, like.head_dim)
        return sphinxkit.llama.KVCache(*sizes, **{"dtype": like.dtype, **options})

    monkeypatch.setattr(llm, "make_cache", make)


def all_at_once(
    llm: LlamaModel, tokenizer: Tokenizer, questions: Sequence[Question], num_draft_tokens: int | None
) -> list[list[int]]:
    decoder = Decoder(
        llm,
        tokenizer,
        [question.embeds for question in questions],
        Sampling(max_new_tokens=max(question.max_new_tokens for question in questions)),
        num_draft_tokens=num_draft_tokens,
        token_ids=[question.ids for question in questions],
    )
    answers = decoder.run()
    return [answer.token_ids[: question.max_new_tokens] for answer, question in zip(answers, questions, strict=True)]


def joining(
    llm: LlamaModel, tokenizer: Tokenizer, questions: Sequence[Question], num_draft_tokens: int | None, at_once: int
) -> list[list[int]]:
    """Continuous batching: a row joins whenever one has left."""
    batch, sequences = ContinuousBatch(llm, tokenizer), []
    waiting = list(questions)
    while waiting or len(batch):
        while waiting and len(batch) < at_once:
            question = waiting.pop(0)
            sampling = Sampling(max_new_tokens=question.max_new_tokens)
            sequence = batch.add(question.embeds, sampling, prompt_ids=question.ids, num_draft_tokens=num_draft_tokens)
            sequences.append(sequence)
        batch.step()
    return [sequence.token_ids for sequence in sequences]


def reusing(
    llm: LlamaModel, tokenizer: Tokenizer, questions: Sequence[Question], num_draft_tokens: int | None
) -> list[list[int]]:
    """Each prompt's first two thirds are in a cache already, as in a further turn of a chat."""
    answers = []
    for question in questions:
        length = len(question.embeds)
        start = 2 * length // 3
        cache = llm.make_cache(1, length + question.max_new_tokens)
        with torch.no_grad():
            llm(question.embeds[None, :-1], cache=cache)  # more than what is reused: a turn that was taken back
        cache.lengths.fill_(start)
        batch = ContinuousBatch(llm, tokenizer, cache=cache)
        sequence = batch.add(
            question.embeds[start:],
            Sampling(max_new_tokens=question.max_new_tokens),
            prompt_ids=question.ids,
            num_draft_tokens=num_draft_tokens,
            num_cached=start,
        )
        while len(batch):
            batch.step()
        answers.append(sequence.token_ids)
    return answers


WAYS = {
    "one by one": functools.partial(joining, at_once=1),
    "two that run": functools.partial(joining, at_once=2),
    "all at once": all_at_once,
    "prefix reused": reusing,
}


@pytest.mark.parametrize(
    ("asked", "way", "cache"),
    [
        *((CROSSED, way, cache) for way in WAYS for cache in CACHES),
        *((name, "two that run", "as made") for name in TINY[1:]),
    ],
    indirect=["asked"],
)
def test_golden_tokens_with_every_switch(
    asked: tuple[SphinxModel, list[Question]],
    llm: LlamaModel,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    cache: str,
) -> None:
    model, questions = asked
    use_caches(llm, monkeypatch, **CACHES[cache])
    for num_draft_tokens in (None, 4):
        answers = WAYS[way](llm, model.require_tokenizer(), questions, num_draft_tokens)
        assert answers == [question.expected for question in questions]


@pytest.mark.parametrize("asked", [CROSSED], indirect=True)
@pytest.mark.slow
def test_golden_tokens_with_compiled_steps(asked: tuple[SphinxModel, list[Question]]) -> None:
    """Traced and guarded as ever, but run operator by operator: that code can be made of it is tested elsewhere."""
    model, questions = asked
    llm, expected = model.llm, [question.expected for question in questions]
    llm.accelerator = CompiledAccelerator("eager")
    try:
        for way in WAYS.values():
            assert way(llm, model.require_tokenizer(), questions, None) == expected
        assert all_at_once(llm, model.require_tokenizer(), questions, 4) == expected
        assert llm.accelerator.num_graphs
    finally:
        llm.accelerator = None
        torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("asked", [CROSSED], indirect=True)
def test_golden_tokens_from_compiled_code(asked: tuple[SphinxModel, list[Question]]) -> None:
    model, questions = asked
    fault = compiler_fault(model.device)
    if fault is not None:
        pytest.skip(fault)
    model.accelerate("compile")
    try:
        answers = WAYS["one by one"](model.llm, model.require_tokenizer(), questions[:2], None)
        assert answers == [question.expected for question in questions[:2]]
    finally:
        model.accelerate(None)
        torch.compiler.reset()


@pytest.mark.parametrize("cache", ["as made", "static shapes"])
@pytest.mark.parametrize("asked", [CROSSED], indirect=True)
def test_golden_tokens_with_many_passes_a_step(
    asked: tuple[SphinxModel, list[Question]], monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    model, questions = asked
    use_caches(model.llm, monkeypatch, **CACHES[cache])
    for passes in (3, 100):
        monkeypatch.setattr("sphinxkit.generation.continuous_batching.PASSES_PER_STEP", {"cpu": passes})
        for way in WAYS.values():
            for num_draft_tokens in (None, 4):
                answers = way(model.llm, model.require_tokenizer(), questions, num_draft_tokens)
                assert answers == [question.expected for question in questions]
