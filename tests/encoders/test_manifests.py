"""The builders' full-size defaults against the names and shapes of the released files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sphinxkit.encoders import create

PREFIX = {
    "clip_vit_large_patch14": "llma.clip.visual.",
    "convnext_xxlarge": "llma.openclip_convnext_xxl.",
    "dinov2_vit_giant_patch14": "llma.dinov2_vitg14.",
    "blip2_qformer": "llma.qformer.",
}
UNUSED = ("llma.clip.visual.proj", "llma.dinov2_vitg14.mask_token")
HELD = [
    *(("llama_ens5", name) for name in PREFIX),
    ("llama_ens5_light", "convnext_xxlarge"),
    ("llama_ens5_light", "dinov2_vit_giant_patch14"),
]


@pytest.mark.parametrize(("model", "name"), HELD)
def test_every_name_and_shape(golden: Path, model: str, name: str) -> None:
    manifest = json.loads((golden / "manifests" / f"{model}.json").read_text())
    expected = {}
    for key, (shape, split) in manifest.items():
        if key.startswith(PREFIX[name]) and key not in UNUSED:
            assert split is None  # an encoder's tensors are whole in every shard
            own = key.removeprefix(PREFIX[name])
            own = own.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
            expected[f"trunk.{own}"] = tuple(shape)
    with torch.device("meta"):
        encoder = create(name)
    assert {key: tuple(tensor.shape) for key, tensor in encoder.state_dict().items()} == expected
    assert len(expected) > 100


@pytest.mark.parametrize(
    ("name", "embed_dim", "num_prefix_tokens", "grid_size", "input_size"),
    [
        ("clip_vit_large_patch14", 1024, 1, (16, 16), 224),
        ("convnext_xxlarge", 3072, 1, (8, 8), 256),
        ("dinov2_vit_giant_patch14", 1536, 1, (16, 16), 224),
        ("blip2_qformer", 768, 32, (0, 0), 224),
    ],
)
def test_facts_and_shapes_on_meta(
    name: str, embed_dim: int, num_prefix_tokens: int, grid_size: tuple[int, int], input_size: int
) -> None:
    with torch.device("meta"):
        encoder = create(name)
        features = encoder(torch.zeros(2, 3, input_size, input_size))
    facts = (encoder.embed_dim, encoder.num_prefix_tokens, encoder.grid_size, encoder.input_size)
    assert facts == (embed_dim, num_prefix_tokens, grid_size, input_size)
    assert (features.prefix.shape, features.grid) == ((2, num_prefix_tokens, embed_dim), grid_size)
