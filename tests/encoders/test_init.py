from __future__ import annotations

from typing import Any

import pytest
import torch

from sphinxkit import encoders
from sphinxkit.errors import RegistryError, ShapeError

TINY = {
    "clip_vit_large_patch14": {"image_size": 28, "embed_dim": 16, "num_heads": 2, "num_layers": 1},
    "convnext_xxlarge": {"input_size": 32, "dims": (8, 8, 8, 16), "depths": (1, 1, 1, 1)},
    "dinov2_vit_giant_patch14": {"input_size": 28, "embed_dim": 16, "num_heads": 2, "num_layers": 1},
    "blip2_qformer": {
        "image_size": 28,
        "vision_dim": 16,
        "vision_layers": 1,
        "vision_heads": 2,
        "vision_hidden_dim": 24,
        "embed_dim": 8,
        "num_layers": 1,
        "num_heads": 2,
        "hidden_dim": 12,
        "num_query_tokens": 3,
    },
    "timm": {"model": "vit_tiny_patch16_224", "input_size": 32, "embed_dim": 16, "num_heads": 2, "depth": 1},
}


def test_every_builder_is_registered_under_its_own_name() -> None:
    assert set(TINY) <= set(encoders.names())
    for name in TINY:
        assert encoders.registry.get(name).__name__ == name
        assert getattr(encoders, name) is encoders.registry.get(name)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("trainable", [False, True])
def test_every_encoder_conforms(name: str, trainable: bool) -> None:
    encoder = encoders.create(name, trainable=trainable, **TINY[name])
    assert encoders.check_encoder(encoder) == []
    assert encoder.info.source


@pytest.mark.parametrize("name", TINY)
def test_every_encoder_conforms_in_bfloat16(name: str) -> None:
    assert encoders.check_encoder(encoders.create(name, **TINY[name]).bfloat16()) == []


@pytest.mark.parametrize("name", TINY)
def test_built_on_meta_then_loaded_is_the_same(name: str) -> None:
    source = encoders.create(name, **TINY[name])
    with torch.device("meta"):
        encoder = encoders.create(name, **TINY[name])
    assert all(tensor.is_meta for tensor in [*encoder.parameters(), *encoder.buffers()])
    encoder.to_empty(device="cpu").load_state_dict(source.state_dict())
    pixels = torch.randn(2, 3, source.input_size, source.input_size)
    assert torch.equal(encoder(pixels).tokens(), source(pixels).tokens())


@pytest.mark.parametrize("name", TINY)
def test_building_leaves_the_default_dtype_and_device_alone(name: str) -> None:
    encoders.create(name, **TINY[name])
    assert torch.get_default_dtype() == torch.float32
    assert torch.zeros(()).device.type == "cpu"


def test_options_models_know_the_builders_keywords() -> None:
    model = encoders.registry.options_model("convnext_xxlarge")
    assert model().model_dump()["input_size"] == 256
    with pytest.raises(RegistryError, match=r"encoder 'convnext_xxlarge': .*unexpected keyword argument 'input_sise'"):
        encoders.create("convnext_xxlarge", input_sise=3)


@pytest.mark.parametrize("name", [name for name in TINY if name != "timm"])
def test_a_hundred_thousand_layers_are_refused_before_one_is_made(name: str) -> None:
    deep = {"depths": (1, 1, 100_000, 1)} if "depths" in TINY[name] else {"num_layers": 100_000}
    with torch.device("meta"), pytest.raises(ShapeError, match=r"layers, but 256 are the most"):
        encoders.create(name, **(TINY[name] | deep))


WRONG = [
    ("clip_vit_large_patch14", {"num_layers": -2}, "expected at least 0 layers, got -2"),
    ("clip_vit_large_patch14", {"mlp_ratio": -1.0}, "hidden_dim must be positive"),
    ("convnext_xxlarge", {"depths": (1, 1, -1, 1)}, "expected at least 0 layers, got -1"),
    ("convnext_xxlarge", {"dims": (8, 8, 0, 8)}, "dims must be positive, got 0"),
    ("dinov2_vit_giant_patch14", {"num_layers": -1}, "expected at least 0 layers, got -1"),
    ("dinov2_vit_giant_patch14", {"hidden_dim": -2}, "hidden_dim must be positive, got -2"),
    ("blip2_qformer", {"vision_layers": -1}, "expected at least 0 layers, got -1"),
    ("blip2_qformer", {"num_query_tokens": 0}, "num_query_tokens must be positive"),
    ("blip2_qformer", {"hidden_dim": 0}, "hidden_dim must be positive, got 0"),
    ("blip2_qformer", {"vision_hidden_dim": -1}, "vision_hidden_dim must be positive"),
]


@pytest.mark.parametrize(("name", "options", "message"), WRONG)
def test_sizes_that_are_not_positive_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        encoders.create(name, **{**TINY[name], **options})
