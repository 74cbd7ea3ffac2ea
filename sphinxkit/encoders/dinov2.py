"""DINOv2's giant vision transformer, with timm's parameter names and the DINOv2 repository's position resampling."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sphinxkit.encoders.base import Encoder, EncoderInfo, check_depth, check_divisible, check_positive, register
from sphinxkit.encoders.formats.base import SPHINXKIT, WeightFormat
from sphinxkit.encoders.formats.dinov2 import DINOV2_FORMATS
from sphinxkit.encoders.layers import INIT_STD, attend, count_layers, init_weights
from sphinxkit.encoders.positions import grid_side, resample_positions
from sphinxkit.errors import ShapeError
from sphinxkit.features import VisionFeatures
from sphinxkit.pixels import IMAGENET_MEAN, IMAGENET_STD

# Added to the wanted grid side before it is divided by the table's side, and the quotient is used as the
# scale of the sampling coordinates. Source: facebookresearch/dinov2, vision_transformer.py, interpolate_offset.
_GRID_OFFSET = 0.1

# Where the weights of the published sizes are: (embed_dim, num_layers), without registers and with four.
_PUBLISHED = {
    (384, 12): ("hf://facebook/dinov2-small", "hf://facebook/dinov2-with-registers-small"),
    (768, 12): ("hf://facebook/dinov2-base", "hf://facebook/dinov2-with-registers-base"),
    (1024, 24): ("hf://facebook/dinov2-large", "hf://facebook/dinov2-with-registers-large"),
    (1536, 40): ("hf://facebook/dinov2-giant", "hf://facebook/dinov2-with-registers-giant"),
}


# Standard deviation of random class and register tokens, and layer scale before training. Source:
# facebookresearch/dinov2, vision_transformer.py, init_weights; configs/ssl_default_config.yaml, layerscale.
_TOKEN_STD = 1e-6
_LAYER_SCALE = 1e-5


def _published(embed_dim: int, num_layers: int, num_register_tokens: int) -> str:
    plain, with_registers = _PUBLISHED.get((embed_dim, num_layers), ("", ""))
    return {0: plain, 4: with_registers}.get(num_register_tokens, "")


class _Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, hidden: Tensor) -> Tensor:
        """Shape: hidden, return: (B, N, D)."""
        query, key, value = self.qkv(hidden).chunk(3, dim=-1)
        out: Tensor = self.proj(attend(query, key, value, self.num_heads))
        return out


class _FeedForward(nn.Module):
    """Two layers around GELU, or around a SiLU gate whose two inputs come from one layer."""

    def __init__(self, dim: int, hidden_dim: int, is_gated: bool) -> None:
        super().__init__()
        self.is_gated = is_gated
        self.fc1 = nn.Linear(dim, (2 if is_gated else 1) * hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, hidden: Tensor) -> Tensor:
        """Shape: hidden, return: (B, N, D)."""
        inner = self.fc1(hidden)
        if self.is_gated:
            gate, inner = inner.chunk(2, dim=-1)
            inner = F.silu(gate) * inner
        else:
            inner = F.gelu(inner)
        out: Tensor = self.fc2(inner)
        return out


class _LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), _LAYER_SCALE))

    def forward(self, hidden: Tensor) -> Tensor:
        """Shape: hidden, return: (B, N, D)."""
        return hidden * self.gamma


class _Block(nn.Module):
    """Pre-norm transformer block with layer scale."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, is_gated: bool, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = _Attention(dim, num_heads)
        self.ls1 = _LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = _FeedForward(dim, hidden_dim, is_gated)
        self.ls2 = _LayerScale(dim)

    def forward(self, hidden: Tensor) -> Tensor:
        """Shape: hidden, return: (B, N, D)."""
        hidden = hidden + self.ls1(self.attn(self.norm1(hidden)))
        out: Tensor = hidden + self.ls2(self.mlp(self.norm2(hidden)))
        return out


class _Dinov2Trunk(nn.Module):
    """The parameters; ``Dinov2Encoder.encode`` runs them, as it resamples the positions."""

    def __init__(
        self,
        num_patches: int,
        patch_size: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        is_gated: bool,
        num_register_tokens: int,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, patch_size, stride=patch_size)))
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + num_patches, dim))
        self.blocks = nn.Sequential(
            *[_Block(dim, num_heads, hidden_dim, is_gated, norm_eps) for _ in range(num_layers)]
        )
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        nn.init.trunc_normal_(self.pos_embed, std=INIT_STD)
        nn.init.normal_(self.cls_token, std=_TOKEN_STD)
        for block in self.blocks:
            init_weights(block, (nn.Linear,))
            if is_gated:  # begins as if there were no gate; source: timm, layers/mlp.py, GluMlp.init_weights
                inner: nn.Linear = block.get_submodule("mlp.fc1")  # type: ignore[assignment]
                nn.init.normal_(inner.weight[hidden_dim:], std=_TOKEN_STD)
                nn.init.ones_(inner.bias[hidden_dim:])
        self.reg_token = None
        if num_register_tokens:
            self.reg_token = nn.Parameter(torch.randn(1, num_register_tokens, dim) * _TOKEN_STD)


class Dinov2Encoder(Encoder):
    """Class token, registers if there are any, and patches of a DINOv2 vision transformer after its last norm.

    Shape:
        pixels: (B, 3, S, S)
        return: prefix (B, 1 + registers, D), patches (B, H*W, D)
    Source: DINOv2, arXiv:2304.07193; registers, arXiv:2309.16588; LLaMA2-Accessory,
        accessory/model/LLM/llama_ens5.py, encode_image.
    """

    weight_formats: ClassVar[tuple[WeightFormat, ...]] = (SPHINXKIT, *DINOV2_FORMATS)
    position_table: ClassVar[str] = "trunk.pos_embed"

    def resample_positions(self, positions: Tensor, grid: int) -> Tensor:
        """As the DINOv2 repository does: without registers by an offset, with registers by size and antialiased.

        Shape:
            positions: (1, 1 + n*n, D)
            return: (1, 1 + grid*grid, D)
        Source: facebookresearch/dinov2, dinov2/models/vision_transformer.py, interpolate_pos_encoding;
            hub/backbones.py, interpolate_antialias and interpolate_offset of the models with registers.
        """
        if self.num_prefix_tokens > 1:
            return resample_positions(positions, grid, antialias=True)
        return resample_positions(positions, grid, antialias=False, offset=_GRID_OFFSET)

    def unseen_options(self) -> Mapping[str, Any]:
        """As :meth:`Encoder.unseen_options`."""
        trunk: Any = self.trunk
        return {"num_heads": trunk.blocks[0].attn.num_heads, "norm_eps": trunk.norm.eps}

    @classmethod
    def sizes(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """As :meth:`Encoder.sizes`."""
        patch = shapes["trunk.patch_embed.proj.weight"]
        hidden, out = shapes["trunk.blocks.0.mlp.fc1.weight"], shapes["trunk.blocks.0.mlp.fc2.weight"]
        side = grid_side(shapes["trunk.pos_embed"][-2], "position table")
        return {
            "patch_size": patch[-1],
            "pretrain_image_size": side * patch[-1],
            "embed_dim": patch[0],
            "num_layers": count_layers(shapes, "trunk.blocks.{}."),
            "ffn": "mlp" if hidden[0] == out[1] else "swiglu",
            "hidden_dim": out[1],
            "num_register_tokens": shapes.get("trunk.reg_token", (0, 0))[1],
        }

    def encode(self, pixels: Tensor) -> VisionFeatures:
        """Run the network on prepared pixels. Shape: as the class."""
        trunk: Any = self.trunk
        patches = rearrange(trunk.patch_embed(pixels), "b d h w -> b (h w) d")
        class_token = trunk.cls_token.expand(patches.shape[0], -1, -1)
        hidden = torch.cat([class_token, patches], dim=1)
        hidden = hidden + self.resample_positions(trunk.pos_embed, self.grid_size[0])
        if trunk.reg_token is not None:  # registers have no position
            registers = trunk.reg_token.expand(patches.shape[0], -1, -1)
            hidden = torch.cat([hidden[:, :1], registers, hidden[:, 1:]], dim=1)
        hidden = trunk.norm(trunk.blocks(hidden))
        prefix, patches = hidden[:, : self.num_prefix_tokens], hidden[:, self.num_prefix_tokens :]
        return VisionFeatures(prefix=prefix, patches=patches, grid=self.grid_size)


@register("dinov2_vit_giant_patch14")
def dinov2_vit_giant_patch14(
    input_size: int = 224,
    patch_size: int = 14,
    pretrain_image_size: int = 518,
    embed_dim: int = 1536,
    num_layers: int = 40,
    num_heads: int = 24,
    mlp_ratio: float = 4.0,
    hidden_dim: int | None = None,
    ffn: Literal["swiglu", "mlp"] = "swiglu",
    num_register_tokens: int = 0,
    norm_eps: float = 1e-6,
    trainable: bool = False,
) -> Dinov2Encoder:
    """DINOv2 ViT-g/14, or with other options one of its smaller sizes; random weights.

    Takes CLIP-normalised pixels like every encoder and renormalises them to ImageNet's statistics. ViT-S, B and L
    are ``ffn="mlp"`` with widths 384, 768, 1024, depths 12, 12, 24 and 6, 12, 16 heads.

    Args:
        input_size: Side of the input in pixels; the position table is resampled to its grid.
        patch_size: Side of a patch in pixels.
        pretrain_image_size: Side in pixels that the position table was trained at.
        embed_dim: Width.
        num_layers: Blocks.
        num_heads: Attention heads.
        mlp_ratio: Feed-forward ratio, before the SwiGLU rule where ``ffn`` is that.
        hidden_dim: Width after the activation; None: ``mlp_ratio * embed_dim``, for a SwiGLU two thirds of it, rounded
            up to eight.
        ffn: Feed-forward layers: "swiglu" (SiLU gate; ViT-g) or "mlp" (exact GELU; ViT-S, B, L).
        num_register_tokens: Register tokens after the class token, 0 or 4 in the published models.
        norm_eps: Epsilon of every LayerNorm.
        trainable: Normal module instead of frozen.
    Raises:
        ShapeError: An image size is no multiple of ``patch_size``, or ``embed_dim`` of ``num_heads``; a negative
            number of registers, or an unknown ``ffn``.
    Source: DINOv2, arXiv:2304.07193; facebookresearch/dinov2, vit_giant2 and SwiGLUFFNFused.
    """
    name = "dinov2_vit_giant_patch14"
    check_depth(name, num_layers)
    check_divisible(name, "input_size", input_size, "patch_size", patch_size)
    check_divisible(name, "pretrain_image_size", pretrain_image_size, "patch_size", patch_size)
    check_divisible(name, "embed_dim", embed_dim, "num_heads", num_heads)
    if ffn not in ("swiglu", "mlp"):
        raise ShapeError(f"{name}: ffn must be 'swiglu' or 'mlp', got {ffn!r}")
    if num_register_tokens < 0:
        raise ShapeError(f"{name}: num_register_tokens must be at least 0, got {num_register_tokens}")
    is_gated = ffn == "swiglu"
    if hidden_dim is None:
        hidden_dim = int(embed_dim * mlp_ratio)
        hidden_dim = (int(hidden_dim * 2 / 3) + 7) // 8 * 8 if is_gated else hidden_dim
    check_positive(name, hidden_dim=hidden_dim)
    trunk = _Dinov2Trunk(
        (pretrain_image_size // patch_size) ** 2,
        patch_size,
        embed_dim,
        num_layers,
        num_heads,
        hidden_dim,
        is_gated,
        num_register_tokens,
        norm_eps,
    )
    side = input_size // patch_size
    return Dinov2Encoder(
        trunk,
        name=name,
        embed_dim=embed_dim,
        num_prefix_tokens=1 + num_register_tokens,
        grid_size=(side, side),
        info=EncoderInfo(
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            input_size=input_size,
            resize_mode="bicubic",
            activation="silu" if is_gated else "gelu",
            source="DINOv2, arXiv:2304.07193; github.com/facebookresearch/dinov2",
            license="Apache-2.0",
            weights=_published(embed_dim, num_layers, num_register_tokens),
        ),
        trainable=trainable,
    )
