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
        sequence.append(token, 0.0)
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


def test_a_seed_holds_for_each_prompt_alone(model: SphinxModel) -> None:
    how: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0, "stop": None}
    first, second = model.generate(["Where is it?", "Why?"], seed=3, **how)
    assert model.generate("Why?", seed=3, **how) == [second]
    assert model.generate(["Why?", "Where is it?"], seed=3, **how) == [second, first]
    several = model.generate(["Why?"] * 3, seed=[3, 4, None], **how)
    assert several[:2] == [second, *model.generate("Why?", seed=4, **how)]
    assert several[0] != several[1]
    with pytest.raises(DataError, match="2 seeds for 1 prompts; give one, or one each"):
        model.generate("Why?", seed=[1, 2], **how)


def test_numbers_that_are_not_finite(model: SphinxModel, tmp_path: Path) -> None:
    from sphinxkit.batch_inference import Request, answer_requests

    weight = model.llm.layers[1].mlp.up_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[3] = torch.nan
    try:
        for call in (
            lambda: model.generate("a", max_new_tokens=3),
            lambda: model.generate("a", max_new_tokens=3, temperature=0.7, seed=1),
            lambda: list(model.stream("a", max_new_tokens=3)),
            lambda: model.chat("a", max_new_tokens=3),
            lambda: model.session().ask("a", max_new_tokens=3),
            lambda: model.score(["a"], [" b"]),
        ):
            with pytest.raises(DataError, match="the logits are not finite"):
                call()
        [answer] = answer_requests(model, [Request(0, "a")])
        assert answer.error is not None
        assert "not finite" in answer.error
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_truncation_leaves_something_of_the_prompt(model: SphinxModel) -> None:
    limit = model.llm.max_seq_len
    words = "word " * 5000
    with pytest.raises(DataError, match=r"max_new_tokens 4090 with 0 image tokens leaves 6 of"):
        model.generate(words, max_new_tokens=limit - 6, truncate="left")
    [shortened] = model.embed_prompts(words, truncate="left", max_new_tokens=limit - 16)
    assert len(shortened.token_ids) == 16
    ids = model.require_tokenizer().encode(words, bos=True)
    [whole] = model.embed_prompts(words[: 2 * limit], truncate="left", max_new_tokens=100)
    assert len(whole.token_ids) == limit - 100  # near the context, too: until both fit
    assert whole.token_ids[0] == ids[0]
    [short] = model.embed_prompts("a", truncate="left", max_new_tokens=10**6)  # short prompts stay whole
    assert short.token_ids == model.require_tokenizer().encode("a", bos=True)


@pytest.mark.parametrize(("device", "dtype"), [("meta", torch.float64), ("cpu", torch.bfloat16)])
def test_the_host_programs_defaults_change_nothing(
    model: SphinxModel, golden: Path, device: str, dtype: torch.dtype
) -> None:
    image = golden / "images" / "wide.png"

    def answers(asked: SphinxModel) -> list[Any]:
        prompts = ["Where is it?", "a b a b"]
        return [
            asked.chat("What is it?", image, max_new_tokens=4),
            asked.generate(prompts, [image, None], max_new_tokens=4, temperature=1.0, seed=3),
            asked.generate(prompts, max_new_tokens=6, num_draft_tokens=2),
            asked.score(["a"], [" b c"], [image]),
            asked.session(image).ask("What is it?", max_new_tokens=3),
        ]

    expected = answers(model)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            assert answers(model) == expected
            assert answers(sphinxkit.load(golden / "llama_ens_light")) == expected
    finally:
        torch.set_default_dtype(torch.float32)
