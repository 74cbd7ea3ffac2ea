from __future__ import annotations

from pathlib import Path

import pytest

from sphinxkit.checkpoint.formats.meta import BALANCE_WEIGHTS
from sphinxkit.checkpoint.formats.released import LLAMA_TYPES, find_shards, guess_vision, type_of_vision, vision_of_type
from sphinxkit.errors import CheckpointError
from sphinxkit.recipe import Recipe
from sphinxkit.tensor_files.files import read_json

PROJECTOR = {"type": "linear", "norm": "layer"}


def test_the_448_arrangement_by_hand() -> None:
    assert vision_of_type("llama_ens5", "") == {
        "image_size": 448,
        "tiler": {"type": "grid", "rows": 2, "cols": 2, "tile_size": 224, "thumbnail": True},
        "branches": [
            {"encoders": ["blip2_qformer"], "projector": PROJECTOR},
            {
                "encoders": ["clip_vit_large_patch14", "convnext_xxlarge", "dinov2_vit_giant_patch14"],
                "mixer": {"type": "channel", "grid": [16, 16]},
                "projector": PROJECTOR,
            },
        ],
        "mixer": "sequence",
    }


def test_the_1024_arrangement_by_hand() -> None:
    assert vision_of_type("llama_ens5_light", "") == {
        "image_size": 1024,
        "tiler": {"type": "grid", "rows": 2, "cols": 2, "tile_size": 512, "thumbnail": True},
        "branches": [
            {
                "encoders": [
                    {"type": "convnext_xxlarge", "input_size": 512},
                    {"type": "dinov2_vit_giant_patch14", "tile_size": 224},
                ],
                "mixer": {"type": "channel", "grid": [16, 16]},
                "projector": PROJECTOR,
            }
        ],
        "mixer": "sequence",
    }


def test_image_sizes() -> None:
    sizes = {name: vision and vision["image_size"] for name, vision in LLAMA_TYPES.items()}
    assert sizes == {
        "llama": None,
        "llama_ens": 224,
        "llama_ens5": 448,
        "llama_ens10": 672,
        "llama_ens5p2": 448,
        "llama_ens_light": 512,
        "llama_ens5_light": 1024,
        "mixtral_sparse": None,
        "mixtral_sparse_ens": 512,
        "mixtral_sparse_ens5": 1024,
    }


@pytest.mark.parametrize("name", LLAMA_TYPES)
def test_type_and_arrangement_there_and_back(name: str) -> None:
    vision, has_experts = vision_of_type(name, ""), name in BALANCE_WEIGHTS
    assert type_of_vision(vision, has_experts) == name
    if vision is not None:
        resolved = Recipe(
            {"kind": "model", "vision": vision, "llm": "llama2_7b", "conversation": "sphinx_v1"}
        ).resolved()
        assert type_of_vision(resolved["vision"], has_experts) == name
        vision["image_size"] = 1
        assert (LLAMA_TYPES[name] or {})["image_size"] != 1  # the table itself is never handed out


def test_an_arrangement_that_was_never_released() -> None:
    vision = vision_of_type("llama_ens5", "") or {}
    vision["branches"][0]["projector"] = {"type": "mlp"}
    with pytest.raises(CheckpointError, match=r"no type for this recipe's vision part .*llama_ens5_light"):
        type_of_vision(vision)


def test_shards_of_whole_experts_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"meta.json: llama_type 'mixtral' is a mixture of experts whose shards"):
        vision_of_type("mixtral", "meta.json")


def test_unknown_type() -> None:
    with pytest.raises(
        CheckpointError, match=r"unknown llama_type 'llama_ens6'; did you mean 'llama_ens5?'.*Known: llama,"
    ):
        vision_of_type("llama_ens6", "meta.json")


def test_shards_are_found_in_order_and_gaps_are_named(tmp_path: Path) -> None:
    assert find_shards(tmp_path) == []
    names = [f"consolidated.{rank:02d}-of-03.model.pth" for rank in range(3)]
    for name in (*reversed(names), "consolidated.00-of-01.model-diff.pth", "consolidated.00-of-03.optimizer.pth"):
        (tmp_path / name).touch()
    assert [path.name for path in find_shards(tmp_path)] == names
    assert len(find_shards(tmp_path, "model-diff")) == 1
    (tmp_path / names[1]).unlink()
    with pytest.raises(CheckpointError, match=r"shards are missing; fetch them:\n  - consolidated.01-of-03.model.pth$"):
        find_shards(tmp_path)
    (tmp_path / names[1]).touch()
    (tmp_path / "consolidated.03-of-03.model.pth").touch()
    with pytest.raises(CheckpointError, match=r"beyond their count:\n  - consolidated.03-of-03.model.pth"):
        find_shards(tmp_path)
    (tmp_path / "consolidated.00-of-01.model.pth").touch()
    with pytest.raises(CheckpointError, match=r"checkpoints in \[1, 3\] parts; keep one"):
        find_shards(tmp_path)


def test_json_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(CheckpointError, match=r"config.json: cannot be read as JSON"):
        read_json(path)
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: cannot be read as JSON"):
        read_json(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"config.json: cannot be read as JSON"):
        read_json(path)
    path.write_text("[1]")
    with pytest.raises(CheckpointError, match="holds list, expected an object"):
        read_json(path)


def test_arrangement_seen_in_the_names() -> None:
    full, light = guess_vision(["llma.qformer.query_tokens"]), guess_vision(["llma.visual_proj.0.weight"])
    assert full is not None
    assert light is not None
    assert (len(full["branches"]), len(light["branches"])) == (2, 1)
    assert guess_vision(["llma.norm.weight"]) is None
