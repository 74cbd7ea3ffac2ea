"""The folder of a whole SPHINX; what transformers reads in it is tested in tests/integrations/transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sphinxkit
from sphinxkit import checkpoint
from sphinxkit.checkpoint.formats.hf_sphinx import hf_sphinx_key_map
from sphinxkit.errors import CheckpointError, RecipeError

NAMES = {
    "llm.embed_tokens.weight": "model.language_model.embed_tokens.weight",
    "llm.layers.3.attention.q_proj.weight": "model.language_model.layers.3.self_attn.q_proj.weight",
    "llm.layers.3.mlp_norm.weight": "model.language_model.layers.3.post_attention_layernorm.weight",
    "llm.norm.weight": "model.language_model.norm.weight",
    "llm.lm_head.weight": "lm_head.weight",
    "vision.start_token": "model.vision_tower.start_token",
    "vision.branches.1.projector.proj.weight": "model.vision_tower.branches.1.projector.proj.weight",
}


@pytest.fixture(scope="module")
def folder(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sphinxkit.convert(golden / "llama_ens_light", tmp_path_factory.mktemp("hf") / "model", format="hf")


@pytest.mark.parametrize(("ours", "theirs"), NAMES.items())
def test_names(ours: str, theirs: str) -> None:
    for found, expected in ((hf_sphinx_key_map().to_theirs(ours), theirs), (hf_sphinx_key_map().to_ours(theirs), ours)):
        assert found is not None
        assert found[0] == expected


def test_query_rows_are_ordered_in_halves(golden: Path, folder: Path) -> None:
    """The other order of rotary pairs, by hand: 4 heads of 16 numbers."""
    with checkpoint.open(golden / "llama_ens_light") as before, safe_open(folder / "model.safetensors", "pt") as after:
        ours = before.read("llm.layers.0.attention.q_proj.weight")
        theirs = after.get_tensor("model.language_model.layers.0.self_attn.q_proj.weight")
        head, pair = 2, 3
        assert torch.equal(theirs[head * 16 + pair], ours[head * 16 + 2 * pair])
        assert torch.equal(theirs[head * 16 + 8 + pair], ours[head * 16 + 2 * pair + 1])
        assert torch.equal(after.get_tensor("model.vision_tower.start_token"), before.read("vision.start_token"))


def test_configuration(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["SphinxForConditionalGeneration"]
    assert (config["model_type"], config["text_config"]["model_type"]) == ("sphinx", "llama")
    assert config["image_token_id"] == config["text_config"]["vocab_size"] == 512
    added = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert added["512"]["content"] == "<image>"
    assert checkpoint.detect(folder) == ["hf_sphinx"]


def test_any_readable_format_and_back(golden: Path, folder: Path, tmp_path: Path) -> None:
    own = sphinxkit.convert(folder, tmp_path / "own", dtype=torch.bfloat16)
    again = sphinxkit.convert(own, tmp_path / "again", format="hf")
    with checkpoint.open(golden / "llama_ens_light") as before, checkpoint.open(again) as after:
        assert list(after) == list(before)
        assert all(torch.equal(after.read(key), before.read(key).bfloat16()) for key in after)
        assert after.recipe == sphinxkit.Recipe.of_checkpoint(before).resolved()


def test_several_files(folder: Path, tmp_path: Path) -> None:
    with checkpoint.open(folder) as opened:
        written = checkpoint.save(tmp_path / "split", opened, format="hf_sphinx", max_shard_bytes=100_000)
        assert len(list(written.glob("model-*.safetensors"))) > 1
        with checkpoint.open(written) as split:
            assert all(torch.equal(split.read(key), opened.read(key)) for key in opened)


@pytest.mark.slow
def test_transformers_is_not_imported(golden: Path, tmp_path: Path) -> None:
    code = (
        f"import sys, sphinxkit; sphinxkit.load(sphinxkit.convert({str(golden / 'llama_ens_light')!r}, "
        f"{str(tmp_path / 'hf')!r}, format='hf')); print('transformers' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_what_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    config = json.loads((folder / "config.json").read_text())
    for changed, message in (
        ({"recipe": None}, "expected objects 'text_config' and 'recipe'"),
        ({"text_config": {"num_attention_heads": "4"}}, "text_config: expected numbers of heads, got '4'"),
    ):
        (broken / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises(CheckpointError, match=message):
            checkpoint.open(broken)
    code = config["recipe"] | {"conversation": "os:getcwd"}
    (broken / "config.json").write_text(json.dumps(config | {"recipe": code}))
    with pytest.raises(RecipeError, match="os:getcwd"):
        sphinxkit.load(broken)
    (broken / "config.json").write_text(json.dumps(config))
    tensors = load_file(broken / "model.safetensors")
    save_file({**tensors, "model.other.weight": torch.zeros(1)}, broken / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'model.other.weight' is not a name this format has"):
        checkpoint.open(broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="needs model.safetensors"):
        checkpoint.open(broken, format="hf_sphinx")


def test_models_without_vision_are_written_alone(folder: Path, tmp_path: Path) -> None:
    text = sphinxkit.convert(folder, tmp_path / "llm", format="hf", part="llm")
    assert json.loads((text / "config.json").read_text())["model_type"] == "llama"
    assert (
        json.loads((sphinxkit.convert(text, tmp_path / "again", format="hf") / "config.json").read_text())["model_type"]
        == "llama"
    )
    with pytest.raises(RecipeError, match="has no vision; write the language model alone"):
        sphinxkit.convert(text, tmp_path / "none", format="hf_sphinx")
