from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import sphinxkit
from sphinxkit import checkpoint, encoders
from sphinxkit.errors import CheckpointError, RecipeError


def test_one_call_converts_and_tells_how_far_it_is(golden: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    written = sphinxkit.convert(
        golden / "llama_ens_light",
        tmp_path / "own",
        dtype=torch.bfloat16,
        progress=lambda key, num_bytes, total: told.append((key, num_bytes, total)),
    )
    assert written == tmp_path / "own"
    assert len({total for _, _, total in told}) == 1
    assert sum(num_bytes for _, num_bytes, _ in told) == told[0][2]
    with checkpoint.open(golden / "llama_ens_light") as before, checkpoint.open(written, verify=True) as after:
        assert after.format == "sphinxkit"
        assert [name for name, _, _ in told] == [*after, *after.unused]
        assert list(before.unused) == list(after.unused)
        key = "llm.layers.1.mlp.up_proj.weight"
        assert torch.equal(after.read(key), before.read(key).bfloat16())


@pytest.mark.parametrize("format", ["meta", "hf"])
def test_the_language_model_alone(golden: Path, tmp_path: Path, format: str) -> None:
    told: list[int] = []
    sphinxkit.convert(
        golden / "llama_ens_light",
        tmp_path / "llm",
        format=format,
        part="llm",
        progress=lambda key, num_bytes, total: told.append(total - num_bytes),
    )
    with checkpoint.open(golden / "llama_ens_light") as before, checkpoint.open(tmp_path / "llm") as after:
        llm = [key for key in before if key.startswith("llm.")]
        assert sorted(after) == sorted(llm)
        assert len(told) == len(llm)
        assert all(torch.equal(before.read(key), after.read(key)) for key in llm)


def test_what_cannot_be_converted(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="format 'gguf'; known: hf, hf_sphinx, meta, safetensors, sphinx,"):
        sphinxkit.convert(tmp_path / "none", tmp_path / "out", format="gguf")
    with pytest.raises(CheckpointError, match="there is no such folder"):
        sphinxkit.convert(tmp_path / "none", tmp_path / "out")
    with pytest.raises(CheckpointError, match="format 'meta' holds a language model alone"):
        sphinxkit.convert(golden / "llama_ens_light", tmp_path / "out", format="meta")
    assert list(tmp_path.iterdir()) == []


def test_the_encoders_of_a_checkpoint(golden: Path, tmp_path: Path) -> None:
    told: list[str] = []
    written = sphinxkit.convert(
        golden / "llama_ens_light",
        tmp_path / "encoders",
        part="encoders",
        dtype=torch.bfloat16,
        progress=lambda key, num_bytes, total: told.append(key),
    )
    with checkpoint.open(golden / "llama_ens_light") as before, checkpoint.open(written, verify=True) as after:
        assert sorted(after) == sorted(told) == sorted(key for key in before if ".encoders." in key)
        assert all(torch.equal(before.read(key).bfloat16(), after.read(key)) for key in after)
        assert after.has_recipe
        assert len(after.unused) == 0


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A recipe whose two encoders have public files beside it."""
    clip = {"type": "clip_vit_large_patch14", "image_size": 56, "embed_dim": 16, "num_layers": 1, "num_heads": 2}
    dino = {"type": "dinov2_vit_giant_patch14", "input_size": 56, "embed_dim": 16, "num_layers": 1, "num_heads": 2}
    state = encoders.create(**_as_options(clip)).state_dict()
    torch.save({name.replace("trunk.", "visual."): tensor for name, tensor in state.items()}, tmp_path / "clip.pth")
    torch.save(encoders.create(**_as_options(dino)).state_dict(), tmp_path / "dino.pth")
    branch = {
        "encoders": [{**clip, "weights": "clip.pth"}, {**dino, "weights": "dino.pth", "tile_size": 56}],
        "mixer": {"type": "channel", "grid": [4, 4]},
    }
    llm = {"type": "llama", "vocab_size": 32, "embed_dim": 16, "num_layers": 1, "num_heads": 2, "hidden_dim": 24}
    document = {"kind": "model", "vision": {"image_size": 56, "branches": [branch]}, "llm": llm}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def _as_options(spec: dict[str, Any]) -> dict[str, Any]:
    return {"name": spec["type"], **{key: value for key, value in spec.items() if key != "type"}}


def test_a_recipes_public_encoders(published: Path, tmp_path: Path) -> None:
    folder = sphinxkit.convert(published, tmp_path / "encoders", part="encoders")
    model = sphinxkit.build(published, weights="pretrained")
    expected = {key: tensor for key, tensor in model.state_dict().items() if ".encoders." in key}
    with checkpoint.open(folder, verify=True) as opened:
        assert set(opened) == set(expected)
        assert all(torch.equal(opened.read(key), tensor) for key, tensor in expected.items())
        clip, dino = opened.recipe["vision"]["branches"][0]["encoders"]
    assert (clip["activation"], "weights" in clip, "weights" in dino, dino["tile_size"]) == ("gelu", False, False, 56)
    half = sphinxkit.convert(published, tmp_path / "half", part="encoders", dtype=torch.bfloat16)
    with checkpoint.open(half) as opened:
        assert {opened.dtype(key) for key in opened} == {torch.bfloat16}


def test_parts_that_cannot_be_converted(golden: Path, published: Path, tmp_path: Path) -> None:
    light = golden / "llama_ens_light"
    with pytest.raises(CheckpointError, match="part='vision': expected 'llm', 'encoders' or None"):
        sphinxkit.convert(light, tmp_path / "out", part="vision")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="only format 'sphinxkit' holds encoders alone, got 'sphinx'"):
        sphinxkit.convert(light, tmp_path / "out", part="encoders", format="sphinx")
    with pytest.raises(RecipeError, match="pretrain_7b.*: expected kind model, got kind train"):
        sphinxkit.convert("pretrain_7b", tmp_path / "out", part="encoders")
    with pytest.raises(RecipeError, match="no encoder says where its weights are"):
        sphinxkit.convert("sphinx_micro", tmp_path / "out", part="encoders")
    text = published.read_text().replace("weights: dino.pth", "")
    published.write_text(text)
    with pytest.raises(RecipeError, match=r"vision.branches\[0\].encoders\[1\] has no weights:"):
        sphinxkit.convert(published, tmp_path / "out", part="encoders")
    assert not (tmp_path / "out").exists()
