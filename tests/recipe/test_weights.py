from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import sphinxkit
from sphinxkit import Recipe, encoders
from sphinxkit.errors import CheckpointError, DataError, RecipeError
from sphinxkit.recipe import shipped_recipes
from sphinxkit.recipe.weights import encoder_sources

CLIP = {"embed_dim": 16, "num_layers": 1, "num_heads": 2}
DINO = {"embed_dim": 24, "num_layers": 2, "num_heads": 2, "pretrain_image_size": 56, "ffn": "mlp"}


@pytest.fixture
def document(tmp_path: Path) -> dict[str, Any]:
    """A small recipe whose two encoders have files of weights, one of them beside the recipe."""
    clip = encoders.create("clip_vit_large_patch14", image_size=56, activation="gelu", **CLIP)
    state = {name.replace("trunk.", "visual."): tensor for name, tensor in clip.state_dict().items()}
    torch.save(state, tmp_path / "clip.pth")
    torch.save(encoders.create("dinov2_vit_giant_patch14", input_size=56, **DINO).state_dict(), tmp_path / "dino.pth")
    return {
        "kind": "model",
        "vision": {
            "image_size": 56,
            "branches": [
                {
                    "encoders": [
                        {
                            "type": "clip_vit_large_patch14",
                            "image_size": 56,
                            "weights": str(tmp_path / "clip.pth"),
                            **CLIP,
                        },
                        {"type": "dinov2_vit_giant_patch14", "input_size": 56, "weights": "dino.pth", **DINO},
                    ],
                    "mixer": {"type": "channel", "grid": [4, 4]},
                }
            ],
        },
        "llm": {"type": "llama", "vocab_size": 32, "embed_dim": 16, "num_layers": 1, "num_heads": 2, "hidden_dim": 24},
    }


@pytest.fixture
def recipe(document: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def trunk(model: Any, position: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = model.vision.branches[0].encoders[position].state_dict()
    return found


def test_pretrained_encoders_come_as_the_recipe_says(
    recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = sphinxkit.build(recipe, weights="pretrained")
    clip, dino = (torch.load(tmp_path / name, weights_only=True) for name in ("clip.pth", "dino.pth"))
    assert torch.equal(trunk(model, 0)["trunk.conv1.weight"], clip["visual.conv1.weight"])
    assert torch.equal(trunk(model, 1)["trunk.pos_embed"], dino["trunk.pos_embed"])
    assert not any(parameter.requires_grad for parameter in model.vision.branches[0].encoders.parameters())
    assert "the language model and the projectors have random weights" in caplog.text
    half = sphinxkit.build(recipe, weights="pretrained", dtype=torch.bfloat16)
    assert torch.equal(trunk(half, 1)["trunk.pos_embed"], dino["trunk.pos_embed"].bfloat16())


def test_the_activation_that_came_is_saved(recipe: Path, tmp_path: Path) -> None:
    model = sphinxkit.build(recipe, weights="pretrained")
    saved: Any = yaml.safe_load(model.recipe_yaml or "")
    clip, dino = saved["vision"]["branches"][0]["encoders"]
    assert clip["activation"] == "gelu"  # open_clip's; the builder's default is quick_gelu
    assert "weights" not in clip
    assert "weights" not in dino
    model.save(tmp_path / "saved")
    (tmp_path / "clip.pth").unlink()
    loaded = sphinxkit.load(tmp_path / "saved")
    pixels = torch.randn(1, 3, 56, 56)
    assert torch.equal(loaded.encode_images(pixels), model.encode_images(pixels))


def test_load_ignores_where_weights_were(recipe: Path, tmp_path: Path) -> None:
    model = sphinxkit.build(recipe)
    model.save(tmp_path / "saved")
    for name in ("clip.pth", "dino.pth"):
        (tmp_path / name).unlink()
    loaded = sphinxkit.load(tmp_path / "saved", recipe=recipe)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_without_weights_the_key_is_ignored_and_that_is_said(recipe: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="sphinxkit"):
        model = sphinxkit.build(recipe)
    expected = "weights: of clip_vit_large_patch14, dinov2_vit_giant_patch14 ignored, random weights instead"
    assert expected in caplog.text
    assert "weights" not in str(yaml.safe_load(model.recipe_yaml or ""))


def test_an_encoder_without_the_key_stays_random_and_that_is_said(
    document: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    del document["vision"]["branches"][0]["encoders"][1]["weights"]
    sphinxkit.build(document, weights="pretrained")
    expected = "vision.branches[0].encoders[1]: dinov2_vit_giant_patch14 has no weights: in the recipe and keeps random"
    assert expected in caplog.text


def test_nothing_says_where(document: dict[str, Any]) -> None:
    for encoder in document["vision"]["branches"][0]["encoders"]:
        del encoder["weights"]
    with pytest.raises(RecipeError, match="no encoder says where its weights are; write `weights: pretrained`"):
        sphinxkit.build(document, weights="pretrained")
    del document["vision"]
    with pytest.raises(RecipeError, match="no encoder says where its weights are"):
        sphinxkit.build(document, weights="pretrained")


def test_what_does_not_fit_is_told_with_its_place(recipe: Path, tmp_path: Path) -> None:
    torch.save({"other": torch.zeros(1)}, tmp_path / "dino.pth")
    with pytest.raises(CheckpointError, match=r"vision.branches\[0\].encoders\[1\]: .*dino.pth: is in no format"):
        sphinxkit.build(recipe, weights="pretrained")


def test_bad_calls(recipe: Path) -> None:
    with pytest.raises(RecipeError, match="weights: expected None or 'pretrained', got '/models/clip.pth'"):
        sphinxkit.build(recipe, weights="/models/clip.pth")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="weights: a model on the meta device holds none"):
        sphinxkit.build(recipe, weights="pretrained", device="meta")


@pytest.mark.parametrize("value", [3, "", " ", ["a"], {"a": 1}, True])
def test_the_key_is_checked(value: Any, document: dict[str, Any]) -> None:
    document["vision"]["branches"][0]["encoders"][0]["weights"] = value
    with pytest.raises(RecipeError) as caught:
        Recipe(document)
    assert f"vision.branches[0].encoders[0].weights: expected a source of weights, got {value!r}" in str(caught.value)


@pytest.mark.parametrize("part", ["mixer", "projector"])
def test_only_encoders_have_the_key(part: str, document: dict[str, Any]) -> None:
    branch = document["vision"]["branches"][0]
    branch[part] = {"type": "linear", **copy.deepcopy(branch.get(part, {})), "weights": "x"}
    with pytest.raises(RecipeError, match=rf"vision.branches\[0\].{part}.weights: unknown key"):
        Recipe(document)


def test_a_builder_with_any_options_does_not_get_it(document: dict[str, Any]) -> None:
    document["vision"]["branches"][0]["encoders"] = [
        {"type": "timm", "model": "vit_tiny_patch16_224", "input_size": 64, "depth": 1, "weights": "pretrained"}
    ]
    document["vision"]["branches"][0]["mixer"] = None
    assert sphinxkit.build(document, device="meta").vision is not None


def test_sources(recipe: Path, tmp_path: Path) -> None:
    found = encoder_sources(Recipe.from_yaml(recipe))
    assert [(place.type, place.source) for place in found] == [
        ("clip_vit_large_patch14", str(tmp_path / "clip.pth")),
        ("dinov2_vit_giant_patch14", str(tmp_path / "dino.pth")),  # beside the recipe
    ]


def test_every_encoder_of_the_shipped_models_says_where_its_weights_are() -> None:
    names = [name for name in shipped_recipes() if name.startswith("sphinx_") and "micro" not in name]
    places = [place for name in names for place in encoder_sources(Recipe.find(name))]
    assert len(places) > 30
    assert {place.source for place in places} == {"pretrained"}
    for place in {f"{place.type} {place.options}": place for place in places}.values():
        assert place.on_meta().info.weights.startswith("hf://")


def test_check_knows_the_parts_of_init_from() -> None:
    sphinxkit.check("pretrain_7b")
    document = dict(Recipe.find("pretrain_7b").document)
    document["init_from"] = {**document["init_from"], "clip_vit_large": "x"}
    with pytest.raises(RecipeError, match=r"init_from.clip_vit_large: expected a part of the model: llm, encoders,"):
        sphinxkit.check(document)
    sphinxkit.check({**document, "init_from": ["a", "b"]})
