"""``llm: {type: from_config, path: ...}``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sphinxkit
from sphinxkit import hub
from sphinxkit.errors import CheckpointError, RecipeError
from sphinxkit.recipe import Recipe
from sphinxkit.tokenizer import Tokenizer
from tests.formatters.test_jinja import CHATML
from tests.tokenizer.conftest import write_qwen

CONFIG = {
    **{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 512, "hidden_size": 32},
    **{"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"head_dim": 16, "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e6},
    **{"tie_word_embeddings": True, "eos_token_id": 421},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder like Qwen3's without its weights; the tokenizer has fewer ids than the model rows."""
    pytest.importorskip("tokenizers")
    found = tmp_path / "qwen"
    found.mkdir()
    (found / "config.json").write_text(json.dumps(CONFIG))
    (found / "generation_config.json").write_text(json.dumps({"eos_token_id": [421, 422]}))
    write_qwen(found)
    return found


def document(path: Path | str, **changes: Any) -> dict[str, Any]:
    return {"kind": "model", "llm": {"type": "from_config", "path": str(path), **changes}, "conversation": "chatml"}


def test_numbers_tokenizer_and_end_ids(folder: Path, tmp_path: Path) -> None:
    model = sphinxkit.build(document(folder, max_seq_len=64, attention="eager"))
    llm = model.llm
    assert (llm.embed_dim, llm.num_kv_heads, llm.head_dim, llm.qk_norm, llm.rope_theta) == (32, 2, 16, True, 1e6)
    assert (llm.max_seq_len, llm.attention, llm.vocab_size) == (64, "eager", 512)
    assert llm.lm_head.weight is llm.embed_tokens.weight
    assert model.tokenizer is not None
    assert model.tokenizer.encode("hi") == Tokenizer(folder).encode("hi")
    assert {421, 422} <= set(model.end_ids)

    model.save(tmp_path / "saved")
    again = sphinxkit.load(tmp_path / "saved")
    assert sorted(each.name for each in (tmp_path / "saved").iterdir()) == [
        *("model.safetensors", "model.safetensors.index.json", "recipe.yaml"),
        *("tokenizer.json", "tokenizer_config.json"),
    ]
    assert "from_config" not in (tmp_path / "saved" / "recipe.yaml").read_text()
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(again(ids), model(ids))
    assert again.end_ids == model.end_ids

    sphinxkit.convert(tmp_path / "saved", tmp_path / "hf", format="hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert {key: config[key] for key in CONFIG if key != "eos_token_id"} == {
        **{key: value for key, value in CONFIG.items() if key != "eos_token_id"},
        "max_position_embeddings": 64,
    }
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    loaded = sphinxkit.load(tmp_path / "hf")
    torch.testing.assert_close(loaded(ids), model(ids), atol=1e-6, rtol=0)  # SDPA for eager: other sums
    assert {421, 422} <= set(loaded.end_ids)
    model.generate(["Hi"], max_new_tokens=3)


def test_a_path_beside_the_recipe_and_what_the_recipe_says_itself(folder: Path) -> None:
    path = folder.parent / "model.yaml"
    path.write_text("kind: model\nllm: {type: from_config, path: qwen}\nend_ids: [3]\n")
    found = Recipe.find(path)
    assert found.document["end_ids"] == [3]
    assert found.document["llm"]["head_dim"] == 16
    assert sphinxkit.check(path).num_parameters == sum(
        parameter.numel() for parameter in sphinxkit.build(path, device="meta").parameters()
    )


def test_what_is_wrong(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="none is no folder with a config.json"):
        Recipe.find(document(tmp_path / "none"))
    with pytest.raises(RecipeError, match=r"llm.path: required key is missing"):
        Recipe.find({"kind": "model", "llm": {"type": "from_config"}})
    with pytest.raises(RecipeError, match=r"llm.embed_dim: unknown key"):
        Recipe.find(document(folder, embed_dim=3))
    with pytest.raises(RecipeError, match="a checkpoint's recipe gives the language model's numbers"):
        Recipe(document(folder), trusted=False)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"logit_softcapping": 3}))
    with pytest.raises(CheckpointError, match="unknown key 'logit_softcapping' with the value 3"):
        Recipe.find(document(folder))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 100}))
    with pytest.raises(CheckpointError, match="the tokenizer has 424 pieces but the embedding has 100 rows"):
        Recipe.find(document(folder))
    monkeypatch.setattr(hub, "cached_folder", lambda place: None)
    with pytest.raises(RecipeError, match="hf://a/b has no config.json in the local cache; run `sphinxkit fetch` with"):
        Recipe.find(document("hf://a/b"))


def test_a_jinja_file_beside_the_recipe_is_written_out(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(CHATML)
    path = tmp_path / "model.yaml"
    path.write_text(
        "kind: model\nllm: {type: from_config, path: qwen}\nconversation: {type: jinja, file: chat.jinja}\n"
    )
    model = sphinxkit.build(path)
    model.save(tmp_path / "saved")
    again = sphinxkit.load(tmp_path / "saved")
    turns = [{"role": "user", "content": "Hi"}]
    assert again.conversation is not None
    assert again.conversation.prompt(turns) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert again.end_ids == model.end_ids
    path.write_text("kind: model\nllm: {type: from_config, path: qwen}\nconversation: {type: jinja, file: no.jinja}\n")
    with pytest.raises(RecipeError, match=r"conversation.file: .*no.jinja cannot be read"):
        sphinxkit.build(path)


def test_the_templates_stop_ends_an_answer_where_it_is_a_token(folder: Path) -> None:
    """Also where the tokenizer's own end-of-sentence is another."""
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**CONFIG, "eos_token_id": 422}))
    model = sphinxkit.build(document(folder))
    assert model.tokenizer is not None
    assert set(model.end_ids) == {422, model.tokenizer.encode("<|im_end|>")[0]}
    model.conversation = None
    assert model.end_ids == (422,)


def test_the_chat_template_of_the_folder(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(CHATML)
    written = {"kind": "model", "llm": {"type": "from_config", "path": str(folder)}}
    assert Recipe.find(written).document["conversation"] == {"type": "chatml"}
    assert Recipe.find(written | {"conversation": "vicuna"}).document["conversation"] == "vicuna"
