"""Language models of other architectures, tied heads and padded vocabularies behind the vision tower."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import sphinxkit
from sphinxkit.tokenizer import Tokenizer
from tests.tokenizer.conftest import WRITERS

LOGITS_ATOL = 1e-4  # as in test_model.py
slow = partial(pytest.param, marks=pytest.mark.slow)
PADDED = 520  # rows, of a tokenizer with 512 pieces


@pytest.mark.parametrize(
    ("options", "name"),
    [
        slow({"num_kv_heads": 2, "tie_embeddings": True, "head_dim": 24}, "LlamaModel"),
        slow({"num_kv_heads": 2, "sliding_window": 64}, "MistralModel"),
        slow({"qkv_bias": True, "tie_embeddings": True}, "Qwen2Model"),
        ({"num_kv_heads": 2, "qk_norm": True, "head_dim": 24}, "Qwen3Model"),
    ],
)
def test_logits_of_other_language_models(options: dict[str, Any], name: str, golden: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from sphinxkit.integrations.transformers import register

    register()
    recipe = sphinxkit.Recipe.find("sphinx_micro").resolved() | {"tokenizer": None}
    recipe["llm"] |= {"vocab_size": PADDED, **options}
    torch.manual_seed(0)
    model = sphinxkit.build(recipe)
    model.tokenizer = Tokenizer(golden / "llama_ens" / "tokenizer.model")
    with torch.no_grad():
        for parameter in model.llm.parameters():  # norms and biases that are not neutral
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save(tmp_path / "own")
    folder = sphinxkit.convert(tmp_path / "own", tmp_path / "hf", format="hf")
    theirs = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    assert type(theirs.model.language_model).__name__ == name
    assert theirs.config.tie_word_embeddings == bool(options.get("tie_embeddings"))
    assert processor.image_token_id == theirs.config.image_token_id == 512
    image = Image.open(golden / "images" / "tall.png")
    prompt, _ = model.chat_prompt("What is it?")
    ids = torch.tensor([model.tokenizer.encode(prompt, bos=True)])
    with torch.no_grad():
        expected = model(ids, model.preprocess([image]))
        found = theirs(**processor(text=prompt, images=image, return_tensors="pt")).logits
    torch.testing.assert_close(found[:, -ids.shape[1] :], expected, atol=LOGITS_ATOL, rtol=0)
    assert theirs.generation_config.suppress_tokens == list(range(512, PADDED))
    back = sphinxkit.load(folder).state_dict()
    assert all(torch.equal(back[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("writer", "conversation"), [slow("qwen", "chatml"), ("llama3", "llama3"), slow("llama2", "vicuna")]
)
def test_ids_of_tokenizer_json(writer: str, conversation: str, golden: Path, tmp_path: Path) -> None:
    from transformers import AutoProcessor

    from sphinxkit.integrations.transformers import register

    register()
    (tmp_path / "words").mkdir()
    WRITERS[writer](tmp_path / "words")
    words = Tokenizer(tmp_path / "words")
    recipe = sphinxkit.Recipe.find("sphinx_micro").resolved() | {"tokenizer": None, "conversation": conversation}
    recipe["llm"] |= {"vocab_size": words.vocab_size}
    model = sphinxkit.build(recipe, tokenizer=words)
    model.save(tmp_path / "own")
    folder = sphinxkit.convert(tmp_path / "own", tmp_path / "hf", format="hf")
    processor = AutoProcessor.from_pretrained(folder)
    messages = [{"role": "user", "content": "A cat. Café?"}, {"role": "assistant", "content": "A cat."}]
    assert model.conversation is not None
    encoded = model.conversation.encode(messages, words)
    image = Image.open(golden / "images" / "tall.png")
    parts = [{"type": "image", "image": image}, {"type": "text", "text": messages[0]["content"]}]
    found = processor.apply_chat_template(
        [{"role": "user", "content": parts}, messages[1]],
        **{"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True},
    )
    [ids], [mask] = found["input_ids"], found["assistant_masks"]
    text_ids = [token for token in ids if token != processor.image_token_id]
    assert len(ids) - len(text_ids) == model.require_vision().num_tokens
    assert text_ids == encoded.token_ids
    learnt = [token for token, is_learnt in zip(ids, mask, strict=True) if is_learnt]
    if writer != "llama2":  # its ":" holds the space that begins an answer, which versions of transformers mark or not
        assert learnt == [label for label in encoded.labels if label != -100]
    stops = json.loads((folder / "generation_config.json").read_text())
    assert "stop_strings" not in stops
    assert stops["eos_token_id"] == list(dict.fromkeys([words.eos_id, *model.end_ids]))
    back = sphinxkit.load(folder)
    assert back.require_tokenizer().vocab_size == words.vocab_size
    processor.save_pretrained(folder)  # with the image's token in tokenizer.json
    assert sphinxkit.load(folder).require_tokenizer().encode("Café") == words.encode("Café")
