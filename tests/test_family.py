"""Checkpoints of the released family beyond the golden ones: other widths, depths, heads, positions, views, shards."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sphinxkit

_spec = importlib.util.spec_from_file_location("released_oracle", Path(__file__).parent / "released_oracle.py")
assert _spec is not None
assert _spec.loader is not None
oracle = importlib.util.module_from_spec(_spec)
sys.modules["released_oracle"] = oracle
_spec.loader.exec_module(oracle)

# sphinxkit in float32 against the oracle in float64: measured 1e-6 to 6e-6 of values of scale 3 (visual tokens) and 5
VISUAL_ATOL = 2e-5
LOGITS_ATOL = 1e-4

CONFIG: dict[str, Any] = {"dim": 64, "n_layers": 2, "n_heads": 4, "multiple_of": 32, "norm_eps": 1e-5}
ENCODERS: dict[str, Any] = {
    "clip": {"image_size": 224, "patch_size": 14, "mlp_ratio": 4.0, "activation": "gelu (exact erf)", "norm_eps": 1e-5}
    | {"width": 24, "layers": 1, "heads": 3},
    "clip_text_leftover": {"embed_dim": 8, "context_length": 6, "vocab_size": 30, "width": 12, "heads": 2},
    "convnext": {"kernel_size": 7, "mlp_ratio": 4, "norm_eps": 1e-5, "activation": "gelu (exact erf)"}
    | {"layer_scale": True, "depths": [1, 2, 1, 1], "dims": [4, 8, 12, 20]},
    "dinov2": {"pretrain_image_size": 518, "patch_size": 14, "mlp_ratio": 4, "ffn": "swiglu, fused w12", "hidden": 96}
    | {"norm_eps": 1e-6, "num_register_tokens": 0, "layer_scale": True, "embed_dim": 36, "layers": 1, "heads": 3},
    "blip2_vision": {"image_size": 224, "patch_size": 14, "activation": "gelu (exact erf)", "norm_eps": 1e-6}
    | {"qkv_bias": True, "hidden_size": 24, "layers": 1, "heads": 3, "intermediate_size": 40},
    "qformer": {"activation": "gelu (exact erf)", "norm_eps": 1e-12, "encoder_hidden_size": 24, "hidden_size": 16}
    | {"layers": 3, "heads": 4, "intermediate_size": 40, "cross_attention_frequency": 2, "num_query_tokens": 32},
}
LIGHT = {key: ENCODERS[key] for key in ("convnext", "dinov2")}
QUICK = ENCODERS | {"clip": ENCODERS["clip"] | {"activation": "quick_gelu"}}

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], int]] = {
    "one shard": ("llama_ens", {}, ENCODERS, 1),
    "four shards, grouped queries": ("llama_ens", {"n_heads": 8, "n_kv_heads": 4}, ENCODERS, 4),
    "quick GELU": ("llama_ens", {"n_layers": 1}, QUICK, 1),
    "RoPE scaling and theta": ("llama_ens_light", {"rope_scaling": 0.25, "rope_theta": 1e6}, LIGHT, 2),
    "FFN multiplier": ("llama_ens_light", {"ffn_dim_multiplier": 1.3, "multiple_of": 16}, LIGHT, 2),
    "norm eps, wide": ("llama_ens_light", {"norm_eps": 1e-6, "dim": 96, "n_heads": 6, "n_kv_heads": 2}, LIGHT, 2),
    "sub-images": ("llama_ens5", {"n_layers": 1}, ENCODERS, 2),
    "672": ("llama_ens10", {"n_layers": 1}, ENCODERS, 2),
    "pooled sub-images": ("llama_ens5p2", {"n_layers": 1}, ENCODERS, 2),
    "two streams of sub-images": ("llama_ens5_light", {"n_layers": 1, "n_kv_heads": 1}, LIGHT, 1),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c == "672" else c for c in CASES])
def test_any_checkpoint_of_the_family(case: str, golden: Path, tmp_path: Path) -> None:
    llama_type, changes, encoders, num_shards = CASES[case]
    config = CONFIG | changes
    tokenizer = (golden / "llama_ens" / "tokenizer.model").read_bytes()
    tensors = oracle.write_checkpoint(
        tmp_path / "model", llama_type, config, encoders, tokenizer, vocab=512, num_shards=num_shards
    )
    expected = oracle.Oracle(llama_type, config, encoders, tensors)
    model = sphinxkit.load(tmp_path / "model")
    pixels = model.preprocess([golden / "images" / "wide.png", golden / "images" / "tall.png"])
    token_ids = torch.tensor([[1, 44, 300, 17], [1, 5, 500, 9]])
    with torch.no_grad():
        images = expected.encode_images(pixels)
        torch.testing.assert_close(model.encode_images(pixels).double(), images, atol=VISUAL_ATOL, rtol=0)
        for seen in (None, pixels):
            logits = expected.logits(token_ids, seen)
            assert logits.std() > 0.3  # nothing has died on the way
            torch.testing.assert_close(model(token_ids, seen).double(), logits, atol=LOGITS_ATOL, rtol=0)


@pytest.mark.parametrize("name", ["llama_ens5", "llama_ens_light"])
def test_the_oracle_agrees_with_the_public_implementation(golden: Path, name: str) -> None:
    from safetensors.torch import load_file

    folder = golden / name
    read = {key: json.loads((folder / f"{key}.json").read_text()) for key in ("config", "encoders", "golden")}
    expected = oracle.Oracle(name, read["config"], read["encoders"], oracle.read_checkpoint(folder))
    tensors = load_file(folder / "golden.safetensors")
    model = sphinxkit.load(folder)
    pixels = model.preprocess([golden / "images" / f"{image}.png" for image in ("wide", "tall")])
    with torch.no_grad():
        logits = expected.logits(tensors["logits.tokens"], pixels)
    torch.testing.assert_close(logits.float(), tensors["logits.with_image"], atol=LOGITS_ATOL, rtol=0)


@pytest.mark.parametrize("name", ["llama_ens10", "llama_ens5_light"])
def test_the_oracles_names_are_the_released_ones(golden: Path, name: str) -> None:
    manifest = json.loads((golden / "manifests" / f"{name}.json").read_text())
    index = json.loads((golden / "manifests" / "index.json").read_text())[name]
    full = {
        "clip": {"width": 1024, "layers": 24, "image_size": 224, "patch_size": 14, "mlp_ratio": 4.0},
        "clip_text_leftover": {"embed_dim": 768, "context_length": 77, "vocab_size": 49408, "width": 768},
        "convnext": {"depths": [3, 4, 30, 3], "dims": [384, 768, 1536, 3072]},
        "dinov2": {"embed_dim": 1536, "layers": 40, "hidden": 4096, "pretrain_image_size": 518, "patch_size": 14},
        "blip2_vision": {"hidden_size": 1408, "layers": 39, "intermediate_size": 6144, "image_size": 224}
        | {"patch_size": 14},
        "qformer": {"hidden_size": 768, "layers": 12, "intermediate_size": 3072, "encoder_hidden_size": 1408}
        | {"cross_attention_frequency": 2, "num_query_tokens": 32},
    }
    shapes = oracle.all_shapes(name, index["config"], full, 32000)
    assert {key: list(shape) for key, shape in shapes.items()} == {key: shape for key, (shape, _) in manifest.items()}
    assert {key: oracle.split_dim(key) for key in shapes} == {key: dim for key, (_, dim) in manifest.items()}
