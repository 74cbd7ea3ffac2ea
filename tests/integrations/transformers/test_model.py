"""The same ids, pixels, logits, answers, loss and gradients through transformers as here."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sphinxkit
from sphinxkit.checkpoint.formats.hf import rotary, rotary_to_halves
from sphinxkit.checkpoint.formats.hf_sphinx import hf_sphinx_key_map
from sphinxkit.errors import DataError, RecipeError
from sphinxkit.formatters.messages import IMAGE_PLACEHOLDER
from sphinxkit.tensor_files.tokenizer_files import IMAGE_TOKEN
from tests.integrations.transformers.conftest import Pair

LOGITS_ATOL = 1e-4  # float32; measured 1.2e-5 of logits up to 16
GRADIENT_RTOL = 1e-4  # norms of differences; measured below 1e-5
QUESTION = "What is in [0.101,0.300,0.599,0.802]?"  # nano's template rounds its coordinates


def read(pair: Pair, question: str = QUESTION, *, image: bool = True, **options: Any) -> Any:
    """What the processor makes of a question."""
    parts = [{"type": "image", "image": pair.image}] if image else []
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
    return pair.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **options
    )


def test_ids_and_pixels(pair: Pair) -> None:
    inputs = read(pair)
    prompt, _ = pair.ours.chat_prompt(QUESTION)
    words = pair.ours.require_tokenizer()
    images = [pair.theirs.config.image_token_id] * pair.num_image_tokens
    assert inputs["input_ids"][0].tolist() == [words.bos_id, *images, *words.encode(prompt)]
    assert torch.equal(inputs["pixel_values"], pair.ours.preprocess([pair.image]))
    assert read(pair, image=False)["input_ids"][0].tolist() == words.encode(prompt, bos=True)


@pytest.mark.parametrize("has_image", [True, False])
def test_logits(pair: Pair, has_image: bool) -> None:
    inputs = read(pair, image=has_image)
    prompt, _ = pair.ours.chat_prompt(QUESTION)
    ids = torch.tensor([pair.ours.require_tokenizer().encode(prompt, bos=True)])
    skipped = pair.num_image_tokens if has_image else 0
    with torch.no_grad():
        ours = pair.ours(ids, pair.ours.preprocess([pair.image]) if has_image else None)
        theirs = pair.theirs(**inputs).logits[:, skipped:]
    torch.testing.assert_close(theirs, ours, atol=LOGITS_ATOL, rtol=0)
    assert ours.abs().max() > 1


def test_greedy_text_of_a_batch_with_and_without_images(pair: Pair) -> None:
    prompt, stop = pair.ours.chat_prompt(QUESTION)
    other = "How many circles are there?"
    alone, _ = pair.ours.chat_prompt(other)
    expected = pair.ours.generate([prompt, alone], [pair.image, None], max_new_tokens=12, stop=stop)
    messages = [
        [{"role": "user", "content": [{"type": "image", "image": pair.image}, {"type": "text", "text": QUESTION}]}],
        [{"role": "user", "content": other}],
    ]
    inputs = pair.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True},
    )  # fmt: skip
    singles = [read(pair), read(pair, other, image=False)]
    with torch.no_grad():
        logits = pair.theirs(**inputs).logits[:, -1]
        for row, single in enumerate(singles):
            expected_logits = pair.theirs(**single).logits[0, -1]
            torch.testing.assert_close(logits[row], expected_logits, atol=LOGITS_ATOL, rtol=0)
    for given in (inputs, *singles):
        rows = range(2) if given is inputs else [singles.index(given)]
        out = pair.theirs.generate(**given, max_new_tokens=12)[:, given["input_ids"].shape[1] :]
        for row, ids in zip(rows, out.tolist(), strict=True):
            assert ids[: len(expected[row].token_ids)] == expected[row].token_ids
            text = pair.ours.require_tokenizer().decode(expected[row].token_ids)
            if "\ufffd" not in text:  # bytes that are no UTF-8 are shown in another way there
                assert pair.processor.decode(ids, skip_special_tokens=True).split(stop[0])[0] == text


def test_loss_and_gradients(pair: Pair) -> None:
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "a red cross"}]
    assert pair.ours.conversation is not None
    words = pair.ours.require_tokenizer()
    encoded = pair.ours.conversation.encode(messages, words)
    ids, labels = torch.tensor([encoded.token_ids[:-1]]), torch.tensor([encoded.labels[:-1]])  # the EOS has no loss
    with_image = [
        {**messages[0], "content": [{"type": "image", "image": pair.image}, {"type": "text", "text": QUESTION}]}
    ]
    inputs = pair.processor.apply_chat_template(
        [*with_image, messages[1]],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
    )
    learnt = torch.as_tensor(inputs.pop("assistant_masks")).bool()
    targets = inputs["input_ids"].masked_fill(~learnt, -100)
    assert targets[learnt].tolist() == labels[labels != -100].tolist()  # {% generation %} marks what is learnt here
    pair.ours.zero_grad()
    pair.theirs.zero_grad()
    loss = pair.ours.loss(ids, labels, pair.ours.preprocess([pair.image]))
    assert isinstance(loss, Tensor)
    loss.backward()
    theirs = pair.theirs(**inputs, labels=targets)
    torch.testing.assert_close(theirs.loss, loss, atol=1e-5, rtol=0)
    theirs.loss.backward()
    gradients = {name: each.grad for name, each in pair.theirs.named_parameters() if each.grad is not None}
    llm = pair.theirs.config.text_config
    convert = partial(rotary, rotary_to_halves, num_heads=llm.num_attention_heads, num_kv_heads=llm.num_key_value_heads)
    compared = 0
    for name, each in pair.ours.named_parameters():
        if each.grad is None:
            continue
        found = hf_sphinx_key_map().to_theirs(name)
        assert found is not None
        change = convert(found[1])
        expected = each.grad if change is None else change(each.grad)
        assert (gradients[found[0]] - expected).norm() <= GRADIENT_RTOL * expected.norm(), name
        compared += 1
    assert compared == len(gradients)
    pair.ours.zero_grad()


def test_frozen_encoders_stay_frozen(pair: Pair) -> None:
    ours = {name for name, each in pair.ours.named_parameters() if each.requires_grad}
    assert sum(each.requires_grad for each in pair.theirs.parameters()) == len(ours)


def test_loads_here_bit_for_bit(pair: Pair) -> None:
    back = sphinxkit.load(pair.folder, accelerate=None)
    expected, found = pair.ours.state_dict(), back.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert back.recipe_yaml == pair.ours.recipe_yaml
    assert back.require_tokenizer().files == pair.ours.require_tokenizer().files


def test_what_transformers_saves_loads_here(pair: Pair, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    pair.theirs.save_pretrained(tmp_path / "saved")
    pair.processor.save_pretrained(tmp_path / "saved")
    back = sphinxkit.load(tmp_path / "saved", accelerate=None)
    expected, found = pair.ours.state_dict(), back.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert back.require_tokenizer().encode(QUESTION) == pair.ours.require_tokenizer().encode(QUESTION)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16
    processor = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert processor.num_image_tokens == pair.num_image_tokens
    assert processor.chat_template == pair.processor.chat_template


def test_image_features(pair: Pair) -> None:
    pixels = pair.ours.preprocess([pair.image, pair.image.rotate(90)])
    with torch.no_grad():
        features = pair.theirs.get_image_features(pixels).pooler_output
        expected = pair.ours.encode_images(pixels)
    assert isinstance(features, list)
    assert [tuple(each.shape) for each in features] == [tuple(expected.shape[1:])] * 2
    torch.testing.assert_close(torch.stack(features), expected)


def test_what_vllm_asks_the_processor(pair: Pair) -> None:
    count = pair.num_image_tokens
    found = pair.processor._get_num_multimodal_tokens(image_sizes=[(20, 30), (1, 1)])
    assert (found.num_image_tokens, found.num_image_patches) == ([count, count], [1, 1])
    assert pair.processor._get_num_multimodal_tokens().num_image_tokens is None
    read_both = pair.processor(
        text=IMAGE_TOKEN * 2, images=[pair.image] * 2, return_text_replacement_offsets=True, return_tensors="pt"
    )
    [spans] = read_both["text_replacement_offsets"]
    start = spans[0]["span"][0]
    assert [each["span"] for each in spans] == [(start, start + 7), (start + 7, start + 14)]
    assert [each["replacement"] for each in spans] == [IMAGE_TOKEN * count] * 2
    assert len(read_both["pixel_values"]) == 2


def test_texts_that_bring_bos_or_image_token(pair: Pair) -> None:
    prompt, _ = pair.ours.chat_prompt(QUESTION)
    expected = read(pair)["input_ids"].tolist()
    for text in (prompt, IMAGE_TOKEN + prompt, "<s>" + prompt, "<s>" + IMAGE_TOKEN + prompt):
        assert pair.processor(text=text, images=pair.image, return_tensors="pt")["input_ids"].tolist() == expected


def test_configuration(pair: Pair) -> None:
    generation = json.loads((pair.folder / "generation_config.json").read_text())
    words = pair.ours.require_tokenizer()
    assert generation["eos_token_id"] == [words.eos_id]
    assert generation["stop_strings"] == ["\n###"]
    assert pair.theirs.config.get_text_config().vocab_size == pair.ours.llm.vocab_size
    assert pair.theirs.config.image_token_id == words.vocab_size
    assert pair.theirs._supports_attention_backend
    assert type(pair.theirs.model.language_model).__name__ == "LlamaModel"
    assert IMAGE_TOKEN == IMAGE_PLACEHOLDER


def test_meta_device_and_headless(pair: Pair) -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(pair.folder)
    with torch.device("meta"):
        empty = AutoModelForImageTextToText.from_config(config)
    assert {each.device.type for each in empty.parameters()} == {"meta"}
    assert not [name for name, _ in empty.named_buffers() if name.startswith("model.vision_tower")]
    backbone = AutoModel.from_pretrained(pair.folder, dtype=torch.float32)
    assert type(backbone).__name__ == "SphinxBackbone"
    with torch.no_grad():
        inputs = read(pair)
        hidden = backbone(**inputs).last_hidden_state
        torch.testing.assert_close(pair.theirs.lm_head(hidden), pair.theirs(**inputs).logits)


def test_what_cannot_be_read(pair: Pair) -> None:
    from sphinxkit.integrations.transformers.config import SphinxConfig
    from sphinxkit.integrations.transformers.model import SphinxBackbone

    inputs = read(pair)
    pixels = inputs["pixel_values"]
    with pytest.raises(DataError, match=rf"{pair.num_image_tokens} image tokens in input_ids, but 2 images have"):
        pair.theirs(input_ids=inputs["input_ids"], pixel_values=torch.cat([pixels, pixels]))
    with pytest.raises(DataError, match="expected one of input_ids and inputs_embeds"):
        pair.theirs(pixel_values=pixels)
    with pytest.raises(DataError, match="inputs_embeds hold the images already"):
        pair.theirs(inputs_embeds=torch.zeros(1, 1, pair.ours.llm.embed_dim), pixel_values=pixels)
    with pytest.raises(DataError, match="reads one image a text, got 2"):
        pair.processor(text="<image><image>a", images=[pair.image] * 2)
    with pytest.raises(DataError, match="the image stands before all text"):
        pair.processor(text="a<image>", images=pair.image)
    with pytest.raises(DataError, match="got videos or audio"):
        pair.processor(text="a", videos=[pair.image])
    text_only = {key: value for key, value in pair.theirs.config.recipe.items() if key != "vision"}
    with pytest.raises(RecipeError, match="has no vision"):
        SphinxBackbone(SphinxConfig(recipe=text_only))
    named = {**pair.theirs.config.recipe, "conversation": "os:getcwd"}
    with pytest.raises(RecipeError):
        SphinxBackbone(SphinxConfig(recipe=named))
