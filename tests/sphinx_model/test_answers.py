"""The confidence of an answer: the mean log-probability of its tokens, by one plain pass over prompt and answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sphinxkit
from sphinxkit.errors import DataError
from sphinxkit.formatters import create
from sphinxkit.generation import GeneratedSequence, Sampling
from sphinxkit.sphinx_model import SphinxModel
from sphinxkit.sphinx_model.answers import uncertainty
from sphinxkit.sphinx_model.prompts import encode_prompt

ATOL = 1e-4
"""One pass over everything against a cache: float32 logits of a few units, summed in another order."""


@pytest.fixture(scope="module")
def model(golden: Path) -> SphinxModel:
    return sphinxkit.load(golden / "llama_ens")


def by_hand(model: SphinxModel, prompt: str, answer: list[int]) -> float:
    ids = encode_prompt(model, prompt)
    with torch.no_grad():
        logits = model(torch.tensor([[*ids, *answer]]))[0]
    vocabulary = model.require_tokenizer().vocab_size
    log_probs = logits[:, :vocabulary].double().log_softmax(-1)
    places = range(len(ids) - 1, len(ids) + len(answer) - 1)
    return sum(float(log_probs[place, token]) for place, token in zip(places, answer, strict=True)) / len(answer)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 3}, {"num_draft_tokens": 3}])
def test_it_is_the_mean_log_probability(model: SphinxModel, options: dict[str, float]) -> None:
    """Under the model itself, whatever the temperature that the tokens were drawn at."""
    prompts = ["a b a b a b", "What is it?"]
    found = model.generate(prompts, max_new_tokens=6, **options)  # type: ignore[arg-type]
    for prompt, answer in zip(prompts, found, strict=True):
        assert answer.token_ids
        assert answer.confidence == pytest.approx(by_hand(model, prompt, answer.token_ids), abs=ATOL)


def test_a_session_has_the_last_answers(model: SphinxModel) -> None:
    session = model.session()
    assert session.confidence is None
    session.ask("What is it?", max_new_tokens=4)
    prompt, stop = model.chat_prompt("What is it?")
    [answer] = model.generate(prompt, max_new_tokens=4, stop=stop)
    assert session.confidence == pytest.approx(answer.confidence, abs=ATOL)


def test_what_ends_an_answer_does_not_count(model: SphinxModel) -> None:
    tokenizer = model.require_tokenizer()
    ids = tokenizer.encode("red green")
    sequence = GeneratedSequence(tokenizer, Sampling(max_new_tokens=9))
    for token, log_prob in zip([*ids, tokenizer.eos_id], [-1.0] * len(ids) + [-9.0], strict=True):
        sequence.append(token, log_prob)
    assert sequence.result().confidence == -1.0
    empty = GeneratedSequence(tokenizer, Sampling(max_new_tokens=9))
    empty.append(tokenizer.eos_id, -0.5)
    assert empty.result().confidence == -0.5


def test_low_confidence_is_told_where_the_recipe_has_a_threshold() -> None:
    plain, marked = create("sphinx_v1"), create("sphinx_v1", low_confidence=-0.5)
    assert uncertainty(plain, -9.0) is None
    assert uncertainty(None, -9.0) is None
    assert uncertainty(marked, None) is None
    assert uncertainty(marked, -0.5) is None
    note = uncertainty(marked, -0.75)
    assert note is not None
    assert note.startswith("low confidence (-0.75, usual are -0.50 and above)")


@pytest.mark.parametrize("value", [0.1, float("nan")])
def test_a_threshold_is_a_log_probability(value: float) -> None:
    with pytest.raises(DataError, match="low_confidence is a mean log-probability, at most 0, or None; got"):
        create("sphinx_v1", low_confidence=value)
