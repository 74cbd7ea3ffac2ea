from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import timm as timm_library
import torch
from torch import Tensor, nn

from sphinxkit.encoders import check_encoder, dinov2_vit_giant_patch14
from sphinxkit.errors import ShapeError
from sphinxkit.pixels import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD

# float32 rounding through at most three blocks on tokens of order one to five.
ROUNDING_ATOL = 3e-5
# The sampling coordinates, up to 37, are float32 (2e-6 off) and the table changes by up to five from cell to cell.
POSITION_ATOL = 3e-5


def resample_positions(positions: Tensor, grid: int) -> Tensor:
    return dinov2_vit_giant_patch14(embed_dim=16, num_heads=2, num_layers=1).resample_positions(positions, grid)


def bicubic(table: Tensor, grid: int, offset: float = 0.1) -> Tensor:
    """(n, n, D) -> (grid, grid, D): cubic convolution with a = -0.75, coordinates scaled by n / (grid + offset)."""
    side = table.shape[0]
    weights = torch.zeros(grid, side, dtype=torch.float64)
    for row in range(grid):
        centre = (row + 0.5) * side / (grid + offset) - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            t = abs(centre - tap)
            inner = 1.25 * t**3 - 2.25 * t**2 + 1
            outer = -0.75 * (t**3 - 5 * t**2 + 8 * t - 4)
            weights[row, min(max(tap, 0), side - 1)] += inner if t <= 1 else outer
    return torch.einsum("gn,hm,nmd->ghd", weights, weights, table.double())


def formula(weights: dict[str, Tensor], pixels: Tensor, heads: int, patch: int, depth: int) -> Tensor:
    """DINOv2's normed tokens in float64 from CLIP-normalised pixels."""
    w = {name.removeprefix("trunk."): tensor.double() for name, tensor in weights.items()}
    stats = [
        torch.tensor(s, dtype=torch.float64).view(3, 1, 1) for s in (CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD)
    ]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[name + ".weight"] + w[name + ".bias"]
        )

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    image = (pixels.double() * stats[1] + stats[0] - stats[2]) / stats[3]
    cells = image.unfold(2, patch, patch).unfold(3, patch, patch)  # B 3 g g p p
    grid = cells.shape[2]
    patches = torch.einsum("bcghij,dcij->bghd", cells, w["patch_embed.proj.weight"]) + w["patch_embed.proj.bias"]
    side = math.isqrt(w["pos_embed"].shape[1] - 1)
    table = w["pos_embed"][0, 1:].unflatten(0, (side, side))
    patches = patches + (table if side == grid else bicubic(table, grid))
    cls = (w["cls_token"] + w["pos_embed"][:, :1]).expand(len(pixels), -1, -1)
    x = torch.cat([cls, patches.flatten(1, 2)], 1)
    for block in range(depth):
        at = f"blocks.{block}."
        q, k, v = (
            t.unflatten(2, (heads, -1)).transpose(1, 2)
            for t in linear(norm(x, at + "norm1"), at + "attn.qkv").chunk(3, -1)
        )
        attended = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        x = x + w[at + "ls1.gamma"] * linear(attended.transpose(1, 2).flatten(2), at + "attn.proj")
        gate, value = linear(norm(x, at + "norm2"), at + "mlp.fc1").chunk(2, -1)
        x = x + w[at + "ls2.gamma"] * linear(gate * torch.sigmoid(gate) * value, at + "mlp.fc2")
    return norm(x, "norm")


@pytest.mark.parametrize(
    ("embed_dim", "num_heads", "num_layers", "input_size"),
    [(28, 2, 1, 224), (32, 4, 3, 56), (32, 4, 2, 70)],  # 37 -> 16 as SPHINX does; 5 -> 4; 5 -> 5, table untouched
)
def test_parity_with_the_hubs_formula(
    embed_dim: int,
    num_heads: int,
    num_layers: int,
    input_size: int,
    randomize: Callable[..., nn.Module],
    random_pixels: Callable[..., Tensor],
) -> None:
    encoder = randomize(
        dinov2_vit_giant_patch14(
            input_size=input_size,
            pretrain_image_size=518 if input_size == 224 else 70,
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_layers=num_layers,
        )
    )
    pixels = random_pixels(2, input_size)
    expected = formula(encoder.state_dict(), pixels, num_heads, 14, num_layers)
    features = encoder(pixels)
    assert features.grid == (input_size // 14, input_size // 14)
    torch.testing.assert_close(features.tokens(), expected.float(), rtol=0, atol=ROUNDING_ATOL)


@pytest.mark.parametrize("grid", [16, 5, 36, 50])
def test_positions_are_resampled_with_the_hubs_offset(grid: int) -> None:
    positions = torch.randn(1, 1 + 37 * 37, 3, generator=torch.Generator().manual_seed(0))
    resampled = resample_positions(positions, grid)
    table = positions[0, 1:].unflatten(0, (37, 37))
    torch.testing.assert_close(resampled[0, 1:], bicubic(table, grid).flatten(0, 1).float(), rtol=0, atol=POSITION_ATOL)
    assert torch.equal(resampled[:, :1], positions[:, :1])
    without_offset = bicubic(table, grid, offset=0.0).flatten(0, 1)
    assert (resampled[0, 1:] - without_offset).abs().max() > 100 * POSITION_ATOL


def test_a_table_of_the_right_size_is_untouched() -> None:
    positions = torch.randn(1, 1 + 25, 3)
    assert resample_positions(positions, 5) is positions


def test_positions_are_resampled_in_float32() -> None:
    positions = torch.randn(1, 1 + 37 * 37, 3).bfloat16()
    expected = resample_positions(positions.float(), 16).bfloat16()
    assert torch.equal(resample_positions(positions, 16), expected)


def test_names_and_layers_are_timms(randomize: Callable[..., nn.Module], random_pixels: Callable[..., Tensor]) -> None:
    options = {"embed_dim": 24, "depth": 2, "num_heads": 2, "mlp_ratio": 128 / 24, "img_size": 56}
    reference = timm_library.create_model("vit_giant_patch14_dinov2", pretrained=False, num_classes=0, **options)
    randomize(reference).eval()
    encoder = dinov2_vit_giant_patch14(
        input_size=56, pretrain_image_size=56, embed_dim=24, num_layers=2, num_heads=2, hidden_dim=64
    )
    encoder.trunk.load_state_dict(reference.state_dict())
    pixels = random_pixels(2, 56)
    with torch.no_grad():
        expected = reference.forward_features(encoder.prepare(pixels))
    torch.testing.assert_close(encoder(pixels).tokens(), expected, rtol=0, atol=ROUNDING_ATOL)


@pytest.mark.parametrize(
    ("embed_dim", "hidden_dim", "expected"), [(1536, None, 4096), (28, None, 80), (30, None, 80), (27, 51, 51)]
)
def test_hidden_width_rule(embed_dim: int, hidden_dim: int | None, expected: int) -> None:
    with torch.device("meta"):
        encoder = dinov2_vit_giant_patch14(embed_dim=embed_dim, num_heads=1, num_layers=1, hidden_dim=hidden_dim)
    state = encoder.state_dict()
    assert state["trunk.blocks.0.mlp.fc1.weight"].shape == (2 * expected, embed_dim)
    assert state["trunk.blocks.0.mlp.fc2.weight"].shape == (embed_dim, expected)


def test_a_row_does_not_depend_on_its_batch(
    randomize: Callable[..., nn.Module], random_pixels: Callable[..., Tensor]
) -> None:
    encoder = randomize(dinov2_vit_giant_patch14(input_size=56, embed_dim=16, num_layers=2, num_heads=2))
    pixels = random_pixels(3, 56)
    together = encoder(pixels).tokens()
    for row in range(3):
        alone = encoder(pixels[row : row + 1]).tokens()
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=ROUNDING_ATOL)


def test_bfloat16_and_gradients() -> None:
    encoder = dinov2_vit_giant_patch14(input_size=56, embed_dim=16, num_layers=1, num_heads=2, trainable=True)
    encoder(torch.randn(1, 3, 56, 56)).tokens().square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    assert encoder.bfloat16()(torch.randn(1, 3, 56, 56)).tokens().dtype == torch.bfloat16


def test_errors() -> None:
    with pytest.raises(ShapeError, match="input_size 225 is not a positive multiple of patch_size 14"):
        dinov2_vit_giant_patch14(input_size=225)
    with pytest.raises(ShapeError, match="pretrain_image_size 500 is not a positive multiple of patch_size 14"):
        dinov2_vit_giant_patch14(pretrain_image_size=500)
    with pytest.raises(ShapeError, match="embed_dim 30 is not a positive multiple of num_heads 4"):
        dinov2_vit_giant_patch14(embed_dim=30, num_heads=4)


@pytest.mark.parametrize(("ffn", "num_register_tokens"), [("mlp", 0), ("mlp", 4), ("swiglu", 2)])
def test_smaller_sizes_and_registers_conform(ffn: Any, num_register_tokens: int) -> None:
    encoder = dinov2_vit_giant_patch14(
        input_size=28,
        embed_dim=16,
        num_heads=2,
        num_layers=1,
        ffn=ffn,
        num_register_tokens=num_register_tokens,
    )
    assert check_encoder(encoder, batch_size=2) == []
    assert encoder.num_prefix_tokens == 1 + num_register_tokens
    hidden = encoder.state_dict()["trunk.blocks.0.mlp.fc2.weight"].shape[1]
    assert (hidden, encoder.info.activation) == ((64, "gelu") if ffn == "mlp" else (48, "silu"))


def test_unknown_ffn_and_negative_registers() -> None:
    with pytest.raises(ShapeError, match="ffn must be 'swiglu' or 'mlp', got 'gated'"):
        dinov2_vit_giant_patch14(ffn="gated")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="num_register_tokens must be at least 0, got -1"):
        dinov2_vit_giant_patch14(num_register_tokens=-1)
