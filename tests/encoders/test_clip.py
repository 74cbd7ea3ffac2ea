from __future__ import annotations

from collections.abc import Callable

import open_clip.transformer
import pytest
import torch
from torch import Tensor, nn

from sphinxkit.encoders import clip_vit_large_patch14
from sphinxkit.errors import RegistryError, ShapeError

# float32 rounding through at most three blocks on tokens of order one to five; QuickGELU for GELU is off by 1e-2.
ROUNDING_ATOL = 2e-5


def upstream(activation: str, image_size: int, embed_dim: int, num_layers: int, num_heads: int) -> nn.Module:
    layer = {"quick_gelu": open_clip.transformer.QuickGELU, "gelu": nn.GELU}[activation]
    network = open_clip.transformer.VisionTransformer(
        image_size=image_size,
        patch_size=14,
        width=embed_dim,
        layers=num_layers,
        heads=num_heads,
        mlp_ratio=4.0,
        output_dim=7,
        act_layer=layer,
        output_tokens=True,
    )
    network.proj = None  # its forward then gives (class token, patches) after ln_post
    return network.eval()


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize(("embed_dim", "num_heads", "num_layers"), [(32, 2, 1), (48, 4, 3)])
def test_parity_with_open_clip(
    activation: str,
    embed_dim: int,
    num_heads: int,
    num_layers: int,
    randomize: Callable[..., nn.Module],
    random_pixels: Callable[..., Tensor],
) -> None:
    reference = randomize(upstream(activation, 70, embed_dim, num_layers, num_heads))
    encoder = clip_vit_large_patch14(
        activation=activation,  # type: ignore[arg-type]
        image_size=70,
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_layers=num_layers,
    )
    encoder.trunk.load_state_dict(reference.state_dict())  # strict: the names are open_clip's, less `proj`
    pixels = random_pixels(3, 70)
    with torch.no_grad():
        class_token, patches = reference(pixels)
    features = encoder(pixels)
    assert features.grid == encoder.grid_size == (5, 5)
    torch.testing.assert_close(features.prefix[:, 0], class_token, rtol=0, atol=ROUNDING_ATOL)
    torch.testing.assert_close(features.patches, patches, rtol=0, atol=ROUNDING_ATOL)


@pytest.mark.parametrize(("option", "value"), [("activation", "gelu"), ("norm_eps", 1e-2)])
def test_options_reach_the_network(
    option: str, value: object, randomize: Callable[..., nn.Module], random_pixels: Callable[..., Tensor]
) -> None:
    plain = randomize(clip_vit_large_patch14(image_size=28, embed_dim=16, num_heads=2, num_layers=1))
    other = clip_vit_large_patch14(image_size=28, embed_dim=16, num_heads=2, num_layers=1, **{option: value})  # type: ignore[arg-type]
    other.load_state_dict(plain.state_dict())
    pixels = random_pixels(2, 28)
    assert (plain(pixels).tokens() - other(pixels).tokens()).abs().max() > 20 * ROUNDING_ATOL


def test_mlp_ratio_and_info() -> None:
    encoder = clip_vit_large_patch14(image_size=28, embed_dim=16, num_heads=2, num_layers=1, mlp_ratio=2.5)
    assert encoder.state_dict()["trunk.transformer.resblocks.0.mlp.c_fc.weight"].shape == (40, 16)
    assert "trunk.proj" not in encoder.state_dict()
    assert (encoder.info.activation, encoder.info.resize_mode, encoder.input_size) == ("quick_gelu", "bicubic", 28)


def test_bfloat16_and_gradients() -> None:
    encoder = clip_vit_large_patch14(image_size=28, embed_dim=16, num_heads=2, num_layers=1, trainable=True)
    encoder(torch.randn(1, 3, 28, 28)).tokens().square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    assert encoder.bfloat16()(torch.randn(1, 3, 28, 28)).tokens().dtype == torch.bfloat16


def test_errors() -> None:
    with pytest.raises(ShapeError, match="image_size 225 is not a positive multiple of patch_size 14"):
        clip_vit_large_patch14(image_size=225)
    with pytest.raises(ShapeError, match="embed_dim 30 is not a positive multiple of num_heads 4"):
        clip_vit_large_patch14(embed_dim=30, num_heads=4)
    with pytest.raises(RegistryError, match="clip_vit_large_patch14: unknown activation 'quickgelu'"):
        clip_vit_large_patch14(activation="quickgelu")  # type: ignore[arg-type]
