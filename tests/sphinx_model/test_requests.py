"""Odd requests: each gets what it means, or a named error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sphinxkit
from sphinxkit.errors import DataError
from sphinxkit.generation import GeneratedSequence, Sampling, stop_strings, top_p_probs
from sphinxkit.sphinx_model import SphinxModel
from sphinxkit.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def model(golden: Path) -> SphinxModel:
    return sphinxkit.load(golden / "llama_ens_light")


def test_a_single_stop_string_is_one_string(model: SphinxModel) -> None:
    free, text = model.generate(["Where is the table?"] * 2, max_new_tokens=12, stop=None)
    assert free == text
    stop = free.text[2:5]
    assert model.generate("Where is the table?", max_new_tokens=12, stop=stop) == model.generate(
        "Where is the table?", max_new_tokens=12, stop=(stop,)
    )
    assert (stop_strings(None), stop_strings("ab"), stop_strings(["a", "b"])) == ((), ("ab",), ("a", "b"))


def test_truncation_leaves_room_for_the_answer(model: SphinxModel) -> None:
    [answer] = model.generate("word " * 5000, max_new_tokens=7, stop=(), truncate="left")
    assert (len(answer.token_ids), answer.finish_reason) == (7, "length")


def test_a_stop_strings_first_bytes_are_not_part_of_the_answer(golden: Path) -> None:
    tokenizer = Tokenizer(golden / "llama_ens" / "tokenizer.model")
    plain, stop = tokenizer.encode("a b"), tokenizer.encode("a bé")
    assert stop[: len(plain)] == plain
    assert len(stop) > len(plain) + 1  # the letter is written in bytes
    sequence = GeneratedSequence(tokenizer, Sampling(max_new_tokens=20, stop=("é",)))
    for token in stop:
        sequence.append(token)
    assert sequence.result().token_ids == plain
    assert (sequence.result().text, sequence.finish_reason) == ("a b", "stop")


@pytest.mark.parametrize("temperature", [1e-40, 1e-10, 1e-3])
def test_tiny_temperatures_are_greedy(temperature: float) -> None:
    probs, ids = top_p_probs(torch.tensor([[1.0, 900.0, -300.0, 2.0]]), temperature, 1.0)
    assert probs[0].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert ids[0, 0] == 1


def test_no_images_are_text(model: SphinxModel) -> None:
    ids = torch.tensor([[1, 5, 9]])
    nothing = torch.zeros(0, 3, 512, 512)
    assert torch.equal(model(ids, nothing, image_rows=[]), model(ids))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate("a", seed=2**64), r"seed must be in \[0, 2\*\*63\), got 18446744073709551616"),
        (lambda m: m.generate(5), "prompts must be a text or a list of texts, got int"),
        (
            lambda m: m.chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
            "chat: the last message is the assistant's, expected the user's",
        ),
        (lambda m: m.score("ab", " c"), "lists of texts, got a single text"),
        (lambda m: m(torch.tensor([[1, 512]])), "token_ids: 512 is outside the vocabulary of 512"),
        (lambda m: m(torch.tensor([[-1, 5]])), "token_ids: -1 is outside the vocabulary of 512"),
        (lambda m: m.loss(torch.tensor([[1, 5]]), torch.tensor([[1, 600]])), "labels: 600 is outside the vocabulary"),
        (
            lambda m: m.loss(torch.tensor([[1, 5]]), torch.tensor([[1, 5]]), reduction="sum"),
            "reduction must be 'mean' or 'none', got 'sum'",
        ),
    ],
)
def test_named_errors(model: SphinxModel, call: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        call(model)
