from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel, Blip2VisionConfig, Blip2VisionModel

from sphinxkit.encoders import blip2_qformer
from sphinxkit.errors import ShapeError

# float32 rounding through at most three layers on tokens of order one to five.
ROUNDING_ATOL = 1e-5

SMALL: dict[str, Any] = {
    "image_size": 42,
    "vision_dim": 32,
    "vision_layers": 2,
    "vision_heads": 2,
    "vision_hidden_dim": 80,
    "embed_dim": 24,
    "num_layers": 3,
    "num_heads": 2,
    "hidden_dim": 64,
    "num_query_tokens": 5,
}
WIDE: dict[str, Any] = {
    "image_size": 56,
    "patch_size": 8,
    "vision_dim": 48,
    "vision_layers": 1,
    "vision_heads": 4,
    "vision_hidden_dim": 72,
    "embed_dim": 40,
    "num_layers": 5,
    "num_heads": 4,
    "hidden_dim": 56,
    "num_query_tokens": 3,
    "cross_attention_frequency": 3,
}


def upstream(options: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    tower = Blip2VisionModel(
        Blip2VisionConfig(
            hidden_size=options["vision_dim"],
            intermediate_size=options["vision_hidden_dim"],
            num_hidden_layers=options["vision_layers"],
            num_attention_heads=options["vision_heads"],
            image_size=options["image_size"],
            patch_size=options.get("patch_size", 14),
            layer_norm_eps=1e-6,
            hidden_act="gelu",
            qkv_bias=True,
        )
    )
    qformer = Blip2QFormerModel(
        Blip2QFormerConfig(
            hidden_size=options["embed_dim"],
            num_hidden_layers=options["num_layers"],
            num_attention_heads=options["num_heads"],
            intermediate_size=options["hidden_dim"],
            encoder_hidden_size=options["vision_dim"],
            cross_attention_frequency=options.get("cross_attention_frequency", 2),
            layer_norm_eps=1e-12,
            hidden_act="gelu",
        )
    )
    return tower.eval(), qformer.eval()


@pytest.mark.parametrize("options", [SMALL, WIDE])
def test_parity_with_transformers(
    options: dict[str, Any], randomize: Callable[..., nn.Module], random_pixels: Callable[..., Tensor]
) -> None:
    tower, qformer = upstream(options)
    randomize(tower, seed=1)
    randomize(qformer, seed=2)
    encoder = randomize(blip2_qformer(**options), seed=3)
    encoder.trunk.vision_model.load_state_dict(tower.state_dict())  # strict: the names are transformers' own
    encoder.trunk.qformer.load_state_dict(qformer.state_dict())
    pixels = random_pixels(3, options["image_size"])
    with torch.no_grad():
        image_tokens = tower(pixel_values=pixels).last_hidden_state
        queries = encoder.trunk.query_tokens.expand(3, -1, -1)
        expected = qformer(query_embeds=queries, encoder_hidden_states=image_tokens).last_hidden_state
        got = encoder.trunk.vision_model(pixels)
    torch.testing.assert_close(got, image_tokens, rtol=0, atol=ROUNDING_ATOL)
    features = encoder(pixels)
    torch.testing.assert_close(features.prefix, expected, rtol=0, atol=ROUNDING_ATOL)
    assert (features.patches.shape, features.grid) == ((3, 0, options["embed_dim"]), (0, 0))


@pytest.mark.parametrize(("frequency", "layers"), [(1, [0, 1, 2]), (2, [0, 2]), (3, [0])])
def test_cross_attention_layers(frequency: int, layers: list[int]) -> None:
    encoder = blip2_qformer(**SMALL, cross_attention_frequency=frequency)
    names = encoder.state_dict()
    found = [n for n in range(3) if f"trunk.qformer.encoder.layer.{n}.crossattention.attention.key.weight" in names]
    assert found == layers


def test_epsilons() -> None:
    encoder = blip2_qformer(**SMALL)
    eps = {name: module.eps for name, module in encoder.named_modules() if isinstance(module, nn.LayerNorm)}
    assert {value for name, value in eps.items() if "vision_model" in name} == {1e-6}
    assert {value for name, value in eps.items() if "vision_model" not in name} == {1e-12}
    other = blip2_qformer(**SMALL, vision_norm_eps=1e-3, norm_eps=1e-4)
    assert {m.eps for m in other.modules() if isinstance(m, nn.LayerNorm)} == {1e-3, 1e-4}


def test_random_weights_read_the_image(random_pixels: Callable[..., Tensor]) -> None:
    tokens = blip2_qformer(**SMALL)(random_pixels(2, 42)).tokens()
    assert not torch.equal(tokens[0], tokens[1])
    assert not torch.equal(tokens[0, 0], tokens[0, 1])


def test_bfloat16_and_gradients(random_pixels: Callable[..., Tensor]) -> None:
    encoder = blip2_qformer(**SMALL, trainable=True)
    pixels = random_pixels(2, 42)
    tokens = encoder(pixels).tokens()
    assert torch.equal(tokens, encoder(pixels).tokens())  # no dropout, training or not
    tokens.square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    assert encoder.bfloat16()(pixels).tokens().dtype == torch.bfloat16


def test_errors() -> None:
    with pytest.raises(ShapeError, match="image_size 225 is not a positive multiple of patch_size 14"):
        blip2_qformer(image_size=225)
    with pytest.raises(ShapeError, match="vision_dim 30 is not a positive multiple of vision_heads 4"):
        blip2_qformer(vision_dim=30, vision_heads=4)
    with pytest.raises(ShapeError, match="embed_dim 30 is not a positive multiple of num_heads 4"):
        blip2_qformer(embed_dim=30, num_heads=4)
    with pytest.raises(ShapeError, match="cross_attention_frequency must be positive, got 0"):
        blip2_qformer(cross_attention_frequency=0)
