"""CLIP's vision transformer, with open_clip's parameter names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sphinxkit.encoders.base import Encoder, EncoderInfo, check_depth, check_divisible, check_positive, register
from sphinxkit.encoders.formats.base import SPHINXKIT, WeightFormat
from sphinxkit.encoders.formats.clip import CLIP_FORMATS
from sphinxkit.encoders.layers import activation_layer, attend, count_layers
from sphinxkit.encoders.positions import grid_side, resample_positions
from sphinxkit.features import VisionFeatures

# Where the weights of the published sizes are: (patch_size, embed_dim, num_layers, image_size).
_PUBLISHED = {
    (32, 768, 12, 224): "hf://openai/clip-vit-base-patch32",
    (16, 768, 12, 224): "hf://openai/clip-vit-base-patch16",
    (14, 1024, 24, 224): "hf://openai/clip-vit-large-patch14",
    (14, 1024, 24, 336): "hf://openai/clip-vit-large-patch14-336",
    (14, 1280, 32, 224): "hf://laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    (14, 1664, 48, 224): "hf://laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
}


def _published(patch_size: int, embed_dim: int, num_layers: int, image_size: int) -> str:
    """The repository of that size, or of the same network at its usual image size (positions are then resampled)."""
    size = (patch_size, embed_dim, num_layers)
    return _PUBLISHED.get((*size, image_size)) or _PUBLISHED.get((*size, 224)) or ""


class _ClipBlock(nn.Module):
    """Pre-norm transformer block; the attention module only holds the parameters."""

    def __init__(
        self, dim: int, num_heads: int, hidden_dim: int, activation: Callable[[], nn.Module], norm_eps: float
    ) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(dim, eps=norm_eps)
        layers = {"c_fc": nn.Linear(dim, hidden_dim), "gelu": activation(), "c_proj": nn.Linear(hidden_dim, dim)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, hidden: Tensor) -> Tensor:
        """Shape: hidden, return: (B, N, D)."""
        attention: Any = self.attn
        qkv = F.linear(self.ln_1(hidden), attention.in_proj_weight, attention.in_proj_bias)
        query, key, value = qkv.chunk(3, dim=-1)
        hidden = hidden + attention.out_proj(attend(query, key, value, attention.num_heads))
        out: Tensor = hidden + self.mlp(self.ln_2(hidden))
        return out


class _ClipTrunk(nn.Module):
    """The network; every token goes through the last norm."""

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        activation: Callable[[], nn.Module],
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size, bias=False)
        std = dim**-0.5  # of random embeddings; source: openai/CLIP, clip/model.py, VisionTransformer
        self.class_embedding = nn.Parameter(std * torch.randn(dim))
        self.positional_embedding = nn.Parameter(std * torch.randn((image_size // patch_size) ** 2 + 1, dim))
        self.ln_pre = nn.LayerNorm(dim, eps=norm_eps)
        blocks = [_ClipBlock(dim, num_heads, hidden_dim, activation, norm_eps) for _ in range(num_layers)]
        self.transformer = nn.Sequential(OrderedDict(resblocks=nn.Sequential(*blocks)))
        self.ln_post = nn.LayerNorm(dim, eps=norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """Shape: pixels: (B, 3, S, S); return: (B, 1 + H*W, D), class token first."""
        patches = rearrange(self.conv1(pixels), "b d h w -> b (h w) d")
        class_token = self.class_embedding.expand(patches.shape[0], 1, -1)
        hidden = self.ln_pre(torch.cat([class_token, patches], dim=1) + self.positional_embedding)
        out: Tensor = self.ln_post(self.transformer(hidden))
        return out


class ClipEncoder(Encoder):
    """Class token and patches of a CLIP vision transformer; the last norm is applied to every token, no projection.

    Shape:
        pixels: (B, 3, S, S)
        return: prefix (B, 1, D), patches (B, H*W, D)
    Source: CLIP, arXiv:2103.00020; SPHINX uses ln_post on all tokens: LLaMA2-Accessory,
        accessory/model/LLM/llama_ens5.py, clip_encode_image.
    """

    weight_formats: ClassVar[tuple[WeightFormat, ...]] = (SPHINXKIT, *CLIP_FORMATS)
    position_table: ClassVar[str] = "trunk.positional_embedding"
    takes_activation: ClassVar[bool] = True

    def resample_positions(self, positions: Tensor, grid: int) -> Tensor:
        """Bicubic with antialiasing. Source: open_clip, model.py, resize_pos_embed.

        Shape:
            positions: (1, 1 + n*n, D)
            return: (1, 1 + grid*grid, D)
        """
        return resample_positions(positions, grid, antialias=True)

    def unseen_options(self) -> Mapping[str, Any]:
        """As :meth:`Encoder.unseen_options`."""
        trunk: Any = self.trunk
        return {"num_heads": trunk.transformer.resblocks[0].attn.num_heads, "norm_eps": trunk.ln_pre.eps}

    @classmethod
    def sizes(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """As :meth:`Encoder.sizes`."""
        patch, hidden = shapes["trunk.conv1.weight"], shapes["trunk.transformer.resblocks.0.mlp.c_fc.weight"]
        side = grid_side(shapes["trunk.positional_embedding"][-2], "position table")
        return {
            "image_size": side * patch[-1],
            "patch_size": patch[-1],
            "embed_dim": patch[0],
            "num_layers": count_layers(shapes, "trunk.transformer.resblocks.{}."),
            "mlp_ratio": hidden[0] / hidden[1],
        }

    def encode(self, pixels: Tensor) -> VisionFeatures:
        """Run the network on prepared pixels. Shape: as the class."""
        hidden = self.trunk(pixels)
        return VisionFeatures(prefix=hidden[:, :1], patches=hidden[:, 1:], grid=self.grid_size)


@register("clip_vit_large_patch14")
def clip_vit_large_patch14(
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu",
    image_size: int = 224,
    patch_size: int = 14,
    embed_dim: int = 1024,
    num_layers: int = 24,
    num_heads: int = 16,
    mlp_ratio: float = 4.0,
    norm_eps: float = 1e-5,
    trainable: bool = False,
) -> ClipEncoder:
    """CLIP ViT-L/14, or with other options any of its sizes; random weights.

    Args:
        activation: "quick_gelu", what OpenAI's weights were trained with, or "gelu" (exact erf), what a build without
            the ``openai`` tag computes.
        image_size: Side of the input in pixels; the position table is made for it.
        patch_size: Side of a patch in pixels.
        embed_dim: Width.
        num_layers: Blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the feed-forward layers over ``embed_dim``.
        norm_eps: Epsilon of every LayerNorm.
        trainable: Normal module instead of frozen.
    Raises:
        ShapeError: ``image_size`` is no multiple of ``patch_size``, or ``embed_dim`` of ``num_heads``.
        RegistryError: Unknown activation.
    Source: CLIP, arXiv:2103.00020, table 20; open_clip, model_configs/ViT-L-14.json.
    """
    name = "clip_vit_large_patch14"
    check_depth(name, num_layers)
    check_divisible(name, "image_size", image_size, "patch_size", patch_size)
    check_divisible(name, "embed_dim", embed_dim, "num_heads", num_heads)
    hidden_dim = int(embed_dim * mlp_ratio)
    check_positive(name, hidden_dim=hidden_dim)
    layer = activation_layer(activation, name)
    trunk = _ClipTrunk(image_size, patch_size, embed_dim, num_layers, num_heads, hidden_dim, layer, norm_eps)
    side = image_size // patch_size
    return ClipEncoder(
        trunk,
        name=name,
        embed_dim=embed_dim,
        num_prefix_tokens=1,
        grid_size=(side, side),
        info=EncoderInfo(
            input_size=image_size,
            resize_mode="bicubic",
            activation=activation,
            source="CLIP, arXiv:2103.00020; github.com/openai/CLIP, github.com/mlfoundations/open_clip",
            license="MIT",
            weights=_published(patch_size, embed_dim, num_layers, image_size),
        ),
        trainable=trainable,
    )
