"""DINOv2's published formats: upstream's module with random weights, saved by upstream's writer, read here.

The project itself is no package; ``Project`` has its names and its arithmetic, written down from the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from sphinxkit import encoders
from sphinxkit.encoders import Encoder
from sphinxkit.errors import CheckpointError

# Tokens of order one to five through at most three float32 blocks in another order of sums.
TOKENS_ATOL = 1e-5

# (embed_dim, num_layers, num_heads): two widths, two depths
SIZES = [(24, 1, 2), (32, 3, 4)]
SIDE, PATCH = 56, 14
HIDDEN = {"mlp": 4, "swiglu": 8 / 3}


def hidden_dim(width: int, ffn: str) -> int:
    return 4 * width if ffn == "mlp" else (int(4 * width * 2 / 3) + 7) // 8 * 8


class Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1)
        out: Tensor = self.proj((weights @ v).transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        out: Tensor = self.fc2(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))
        return out


class SwiGlu(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        out: Tensor = self.w3(gate * torch.sigmoid(gate) * value)
        return out


class Block(nn.Module):
    def __init__(self, width: int, heads: int, ffn: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.ls1, self.ls2 = Scale(width), Scale(width)
        self.mlp = (Mlp if ffn == "mlp" else SwiGlu)(width, hidden_dim(width, ffn))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        out: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return out


class Project(nn.Module):
    """DINOv2 under the names of facebookresearch/dinov2's files, at the size of its position table."""

    def __init__(self, width: int, layers: int, heads: int, ffn: str, registers: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (SIDE // PATCH) ** 2, width))
        self.mask_token = nn.Parameter(torch.randn(1, width))
        if registers:
            self.register_tokens = nn.Parameter(torch.randn(1, registers, width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, PATCH, PATCH)
        self.blocks = nn.ModuleList([Block(width, heads, ffn) for _ in range(layers)])
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches], 1) + self.pos_embed
        if hasattr(self, "register_tokens"):
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(pixels), -1, -1), x[:, 1:]], 1)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x)
        return out


def ours(source: Path, size: tuple[int, int, int], ffn: str, registers: int, **options: Any) -> Encoder:
    width, layers, heads = size
    given = {"input_size": SIDE, "pretrain_image_size": SIDE, "patch_size": PATCH, **options}
    return encoders.create(
        "dinov2_vit_giant_patch14",
        weights=source,
        embed_dim=width,
        num_layers=layers,
        num_heads=heads,
        ffn=ffn,
        num_register_tokens=registers,
        **given,
    )


def check(encoder: Encoder, model: Callable[[Tensor], Tensor], pixels: Tensor, registers: int) -> None:
    with torch.no_grad():
        expected = model(encoder.prepare(pixels))
    features = encoder(pixels)
    assert features.prefix.shape[1] == encoder.num_prefix_tokens == 1 + registers
    torch.testing.assert_close(features.tokens(), expected, rtol=0, atol=TOKENS_ATOL)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("registers", [0, 4])
def test_the_projects_own_files(
    size: tuple[int, int, int],
    ffn: str,
    registers: int,
    tmp_path: Path,
    randomize: Callable[..., nn.Module],
    random_pixels: Callable[..., Tensor],
) -> None:
    model = randomize(Project(*size, ffn, registers))
    path = tmp_path / "dinov2_pretrain.pth"
    torch.save(model.state_dict(), path)
    encoder = ours(path, size, ffn, registers)
    check(encoder, model, random_pixels(2, SIDE), registers)
    assert encoders.load_weights(encoder, path).format == "DINOv2's own"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("registers", [0, 4])
def test_hugging_face(
    size: tuple[int, int, int],
    ffn: str,
    registers: int,
    tmp_path: Path,
    randomize: Callable[..., nn.Module],
    random_pixels: Callable[..., Tensor],
) -> None:
    width, layers, heads = size
    options: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": SIDE,
        "patch_size": PATCH,
        "use_swiglu_ffn": ffn == "swiglu",
    }
    model: Any
    if registers:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**options, num_register_tokens=registers))
    else:
        model = Dinov2Model(Dinov2Config(**options))
    randomize(model).eval()
    model.save_pretrained(tmp_path)
    encoder = ours(tmp_path, size, ffn, registers)
    check(encoder, lambda pixels: model(pixel_values=pixels).last_hidden_state, random_pixels(2, SIDE), registers)
    # a state dict saved as it is has the names of transformers' modules, which its writer converts
    torch.save(model.state_dict(), tmp_path / "state.bin")
    other = ours(tmp_path / "state.bin", size, ffn, registers)
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), other.parameters(), strict=True))
    if registers:  # with registers, transformers resamples positions as the project does
        other = ours(tmp_path, size, ffn, registers, input_size=42)
        check(other, lambda pixels: model(pixel_values=pixels).last_hidden_state, random_pixels(2, 42), registers)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("architecture", "ffn", "registers"),
    [
        ("vit_small_patch14_dinov2", "mlp", 0),
        ("vit_small_patch14_reg4_dinov2", "mlp", 4),
        ("vit_giant_patch14_dinov2", "swiglu", 0),
        ("vit_giant_patch14_reg4_dinov2", "swiglu", 4),
    ],
)
def test_timm(
    size: tuple[int, int, int],
    architecture: str,
    ffn: str,
    registers: int,
    tmp_path: Path,
    randomize: Callable[..., nn.Module],
    random_pixels: Callable[..., Tensor],
) -> None:
    width, layers, heads = size
    packed = hidden_dim(width, ffn) * (1 if ffn == "mlp" else 2)
    model: Any = timm.create_model(
        architecture,
        embed_dim=width,
        depth=layers,
        num_heads=heads,
        img_size=SIDE,
        mlp_ratio=(packed + 0.5) / width,
    )
    randomize(model).eval()
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=registers > 0)
    check(ours(tmp_path, size, ffn, registers), model.forward_features, random_pixels(2, SIDE), registers)


@pytest.mark.parametrize(("registers", "offset"), [(0, 0.1), (4, 0.0)])
def test_a_table_of_another_size_is_resampled_by_the_projects_rule(
    registers: int, offset: float, tmp_path: Path, randomize: Callable[..., nn.Module]
) -> None:
    model: Any = randomize(Project(*SIZES[0], "mlp", registers))
    path = tmp_path / "dinov2.pth"
    torch.save(model.state_dict(), path)
    encoder = ours(path, SIZES[0], "mlp", registers, pretrain_image_size=42)
    table = model.pos_embed.detach()[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    size: dict[str, Any] = {"scale_factor": (3 + offset) / 4} if offset else {"size": (3, 3)}
    expected = nn.functional.interpolate(table, mode="bicubic", antialias=registers > 0, **size)
    positions = encoder.state_dict()["trunk.pos_embed"]
    assert torch.equal(positions[:, :1], model.pos_embed[:, :1])
    assert torch.equal(positions[:, 1:], expected.flatten(2).transpose(1, 2))
    report = encoders.load_weights(encoder, path)
    assert report.resampled == ("trunk.pos_embed from 4x4 to 3x3",)
    assert "positions resampled: trunk.pos_embed from 4x4 to 3x3" in str(report)


def test_what_does_not_fit_is_one_error_with_the_options_that_would(tmp_path: Path) -> None:
    model = Project(*SIZES[1], "mlp", 4)
    torch.save(model.state_dict(), tmp_path / "dinov2.pth")
    with pytest.raises(CheckpointError) as caught:
        ours(tmp_path / "dinov2.pth", SIZES[0], "swiglu", 0)
    text = str(caught.value)
    assert "(DINOv2's own) does not fit encoder dinov2_vit_giant_patch14" in text
    assert "patch_size=14, pretrain_image_size=56, embed_dim=32, num_layers=3, ffn='mlp', hidden_dim=128" in text
    assert "num_register_tokens=4" in text
    assert "'trunk.reg_token' is in the files but not in the encoder" in text
    assert "'trunk.blocks.2.norm1.weight' is in the files but not in the encoder" in text
    assert "'trunk.cls_token' is [1, 1, 32] in the files, [1, 1, 24] in the encoder" in text


@pytest.mark.parametrize(("option", "value"), [("num_heads", 4), ("norm_eps", 1e-5)])
def test_what_only_the_configuration_tells(option: str, value: float, tmp_path: Path) -> None:
    width, layers, heads = SIZES[0]
    config = Dinov2Config(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, image_size=SIDE, patch_size=PATCH
    )
    Dinov2Model(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"{option} is .* in the files' configuration, {value} in the encoder"):
        ours(
            tmp_path,
            (width, layers, int(value) if option == "num_heads" else heads),
            "mlp",
            0,
            **({} if option == "num_heads" else {option: value}),
        )
