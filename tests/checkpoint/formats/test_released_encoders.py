from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from sphinxkit import encoders
from sphinxkit.checkpoint.formats.released import LLAMA_TYPES, vision_of_type
from sphinxkit.checkpoint.formats.released_encoders import (
    ENCODER_DEFAULTS,
    encoder_options,
    encoders_json,
    with_encoder_options,
)
from sphinxkit.errors import CheckpointError

FILE = Path("encoders.json")


@pytest.fixture
def stated(golden: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((golden / "llama_ens" / "encoders.json").read_text())
    return content


@pytest.mark.parametrize("name", ENCODER_DEFAULTS)
def test_defaults_are_those_of_the_builders(name: str) -> None:
    signature = inspect.signature(encoders.registry.get(name))
    for option, default in ENCODER_DEFAULTS[name].items():
        actual = signature.parameters[option].default
        assert (list(actual) if isinstance(actual, tuple) else actual) == default, option


def test_widths_of_the_golden_file_by_hand(stated: dict[str, Any]) -> None:
    assert encoder_options(stated, FILE) == {
        "clip_vit_large_patch14": {"activation": "gelu", "embed_dim": 32, "num_layers": 2, "num_heads": 2},
        "convnext_xxlarge": {"depths": [1, 1, 1, 1], "dims": [8, 16, 32, 64]},
        "dinov2_vit_giant_patch14": {"embed_dim": 28, "num_layers": 2, "num_heads": 2},
        "blip2_qformer": {
            "vision_dim": 32,
            "vision_layers": 2,
            "vision_heads": 2,
            "vision_hidden_dim": 80,
            "embed_dim": 24,
            "num_layers": 2,
            "num_heads": 2,
            "hidden_dim": 64,
        },
    }


def test_other_numbers_are_followed(stated: dict[str, Any]) -> None:
    stated["clip"] |= {"activation": "quick_gelu", "mlp_ratio": 3.0, "norm_eps": 1e-6, "image_size": 336}
    stated["dinov2"] |= {"hidden": 96, "pretrain_image_size": 224}
    stated["convnext"]["activation"] = "gelu (tanh)"
    stated["blip2_vision"]["norm_eps"] = 1e-5
    stated["qformer"] |= {"norm_eps": 1e-5, "num_query_tokens": 16, "cross_attention_frequency": 1}
    options = encoder_options(stated, FILE)
    assert options["clip_vit_large_patch14"] == {
        "image_size": 336, "mlp_ratio": 3.0, "norm_eps": 1e-6, "embed_dim": 32, "num_layers": 2, "num_heads": 2,
    }  # fmt: skip
    assert options["dinov2_vit_giant_patch14"]["hidden_dim"] == 96
    assert options["dinov2_vit_giant_patch14"]["pretrain_image_size"] == 224
    assert options["convnext_xxlarge"]["activation"] == "gelu_tanh"
    qformer = options["blip2_qformer"]
    assert (qformer["vision_norm_eps"], qformer["norm_eps"]) == (1e-5, 1e-5)
    assert (qformer["num_query_tokens"], qformer["cross_attention_frequency"]) == (16, 1)


def test_nothing_stated_is_full_size() -> None:
    assert encoder_options({"note": "x"}, FILE) == {}
    assert encoder_options({"clip": {}, "convnext": {"dims": [384, 768, 1536, 3072]}}, FILE) == {
        "clip_vit_large_patch14": {},
        "convnext_xxlarge": {},
    }


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("clip", {"widht": 5}, r"clip.widht is not known$"),
        ("convnext", {"kernel_size": 5}, "convnext.kernel_size is 5; the encoder only exists with 7"),
        ("convnext", {"layer_scale": False}, "convnext.layer_scale is False"),
        ("dinov2", {"num_register_tokens": 4}, "dinov2.num_register_tokens is 4"),
        ("dinov2", {"ffn": "mlp"}, "dinov2.ffn is 'mlp'"),
        ("blip2_vision", {"qkv_bias": False}, "blip2_vision.qkv_bias is False"),
        ("qformer", {"activation": "relu"}, "qformer.activation is 'relu', expected one of"),
        ("qformer", {"activation": "quick_gelu"}, "qformer.activation is 'quick_gelu'; the encoder only exists with"),
        ("qformer", {"encoder_hidden_size": 48}, "qformer.encoder_hidden_size is 48, which contradicts 32"),
    ],
)
def test_what_cannot_be_followed_is_refused(
    stated: dict[str, Any], section: str, change: dict[str, Any], message: str
) -> None:
    stated[section] |= change
    with pytest.raises(CheckpointError, match=message):
        encoder_options(stated, FILE)


def test_all_errors_are_listed_at_once(stated: dict[str, Any]) -> None:
    stated["clip"]["x"] = 1
    stated["dino"] = {}
    stated["convnext"] = 3
    with pytest.raises(CheckpointError, match=r"encoders.json cannot be followed") as caught:
        encoder_options(stated, FILE)
    for text in (
        "clip.x is not known",
        "section 'dino' is not known",
        "section 'convnext' is not",
    ):
        assert text in str(caught.value)


@pytest.mark.parametrize("llama_type", ["llama_ens5", "llama_ens_light"])
def test_there_and_back(golden: Path, llama_type: str) -> None:
    stated = json.loads((golden / llama_type / "encoders.json").read_text())
    options = encoder_options(stated, FILE)
    vision = with_encoder_options(vision_of_type(llama_type, "") or {}, options)
    written = encoders_json(vision)
    assert written is not None
    assert encoder_options(written, FILE) == options
    stated.pop("note")
    stated.pop("clip_text_leftover", None)
    assert written == stated


def test_full_size_needs_no_file_however_it_is_written() -> None:
    for name, vision in LLAMA_TYPES.items():
        assert vision is None or encoders_json(vision) is None, name
    spelled_out = with_encoder_options(LLAMA_TYPES["llama_ens5"] or {}, copy.deepcopy(ENCODER_DEFAULTS))
    spelled_out["branches"][1]["encoders"][1]["dims"] = (384, 768, 1536, 3072)
    assert encoders_json(spelled_out) is None


def test_encoders_of_somebody_else_are_left_out() -> None:
    vision = {
        "branches": [{"encoders": [{"type": "timm", "model": "vit"}, {"type": "convnext_xxlarge", "dims": [8] * 4}]}]
    }
    written = encoders_json(vision)
    assert written is not None
    assert list(written) == ["convnext"]


@pytest.mark.parametrize(
    ("section", "key", "value", "expected"),
    [
        ("dinov2", "embed_dim", "x", "a positive whole number"),
        ("dinov2", "hidden", "x", "a positive whole number"),
        ("dinov2", "layers", 2.5, "a positive whole number"),
        ("dinov2", "heads", 0, "a positive whole number"),
        ("dinov2", "heads", True, "a positive whole number"),
        ("clip", "mlp_ratio", "4", "a positive number"),
        ("convnext", "dims", 384, "4 positive whole numbers"),
        ("convnext", "depths", [3, 4, 30, "x"], "4 positive whole numbers"),
    ],
)
def test_values_of_another_kind(section: str, key: str, value: object, expected: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        encoder_options({section: {key: value}}, Path("d/encoders.json"))
    assert (
        str(caught.value)
        == f"d/encoders.json cannot be followed:\n  - {section}.{key} is {value!r}, expected {expected}"
    )


@pytest.mark.parametrize("option", [{"ffn": "mlp"}, {"num_register_tokens": 4}])
def test_another_dinov2_is_not_written_as_if_it_were_the_released_one(option: dict[str, Any]) -> None:
    vision = {"branches": [{"encoders": [{"type": "dinov2_vit_giant_patch14", **option}]}]}
    with pytest.raises(CheckpointError, match="format 'sphinx' has a DINOv2 with ffn 'swiglu' and no registers only"):
        encoders_json(vision)
    assert encoders_json({"branches": [{"encoders": ["dinov2_vit_giant_patch14"]}]}) is None
