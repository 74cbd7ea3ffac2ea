"""DINOv2's giant vision transformer, built on timm's module with the DINOv2 repository's position resampling."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sphinxkit.encoders.base import Encoder, EncoderInfo, check_divisible, register
from sphinxkit.features import VisionFeatures
from sphinxkit.pixels import IMAGENET_MEAN, IMAGENET_STD

# Added to the wanted grid side before it is divided by the table's side, and the quotient is used as the
# scale of the sampling coordinates. Source: facebookresearch/dinov2, vision_transformer.py, interpolate_offset.
_GRID_OFFSET = 0.1


def resample_positions(positions: Tensor, grid: int) -> Tensor:
    """Resample a square position table to another grid, as the DINOv2 repository does.

    Bicubic in float32, not antialiased, coordinates scaled by table side / (``grid`` + 0.1). A table of the right
    size is returned as it is.

    Args:
        positions: Class token's position first, then the patches' row-major.
        grid: Side of the wanted grid in patches.
    Shape:
        positions: (1, 1 + n*n, D)
        return: (1, 1 + grid*grid, D)
    Source: facebookresearch/dinov2, dinov2/models/vision_transformer.py, interpolate_pos_encoding.
    """
    side = round((positions.shape[1] - 1) ** 0.5)
    if side == grid:
        return positions
    table = rearrange(positions[:, 1:].float(), "1 (h w) d -> 1 d h w", h=side)
    scale = (grid + _GRID_OFFSET) / side
    table = F.interpolate(table, scale_factor=(scale, scale), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], rearrange(table, "1 d h w -> 1 (h w) d").to(positions.dtype)], dim=1)


class Dinov2Encoder(Encoder):
    """Class token and patches of a DINOv2 vision transformer after its last norm.

    Shape:
        pixels: (B, 3, S, S)
        return: prefix (B, 1, D), patches (B, H*W, D)
    Source: DINOv2, arXiv:2304.07193; LLaMA2-Accessory, accessory/model/LLM/llama_ens5.py, encode_image.
    """

    def encode(self, pixels: Tensor) -> VisionFeatures:
        """Run the network on prepared pixels.

        Shape:
            pixels: (B, 3, input_size, input_size)
            return: prefix (B, 1, D), patches (B, H*W, D)
        """
        trunk: Any = self.trunk
        patches = rearrange(trunk.patch_embed.proj(pixels), "b d h w -> b (h w) d")
        class_token = trunk.cls_token.expand(patches.shape[0], -1, -1)
        hidden = torch.cat([class_token, patches], dim=1) + resample_positions(trunk.pos_embed, self.grid_size[0])
        for block in trunk.blocks:
            hidden = block(hidden)
        hidden = trunk.norm(hidden)
        return VisionFeatures(prefix=hidden[:, :1], patches=hidden[:, 1:], grid=self.grid_size)


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
    norm_eps: float = 1e-6,
    trainable: bool = False,
) -> Dinov2Encoder:
    """DINOv2 ViT-g/14 (without registers), random weights, all widths configurable.

    Takes CLIP-normalised pixels like every encoder and renormalises them to ImageNet's statistics.

    Args:
        input_size: Side of the input in pixels; the position table is resampled to its grid.
        patch_size: Side of a patch in pixels.
        pretrain_image_size: Side in pixels that the position table was trained at.
        embed_dim: Width.
        num_layers: Blocks.
        num_heads: Attention heads.
        mlp_ratio: Feed-forward ratio before the SwiGLU rule.
        hidden_dim: Width of the SwiGLU's gate; None: two thirds of ``mlp_ratio * embed_dim``, rounded up to eight.
        norm_eps: Epsilon of every LayerNorm.
        trainable: Normal module instead of frozen.
    Raises:
        ShapeError: An image size is no multiple of ``patch_size``, or ``embed_dim`` of ``num_heads``.
    Source: DINOv2, arXiv:2304.07193; facebookresearch/dinov2, vit_giant2 and SwiGLUFFNFused.
    """
    from timm.layers import SwiGLUPacked
    from timm.models.vision_transformer import VisionTransformer

    name = "dinov2_vit_giant_patch14"
    check_divisible(name, "input_size", input_size, "patch_size", patch_size)
    check_divisible(name, "pretrain_image_size", pretrain_image_size, "patch_size", patch_size)
    check_divisible(name, "embed_dim", embed_dim, "num_heads", num_heads)
    if hidden_dim is None:
        hidden_dim = (int(int(embed_dim * mlp_ratio) * 2 / 3) + 7) // 8 * 8
    trunk = VisionTransformer(
        img_size=pretrain_image_size,
        patch_size=patch_size,
        num_classes=0,
        global_pool="token",
        embed_dim=embed_dim,
        depth=num_layers,
        num_heads=num_heads,
        # timm truncates mlp_ratio * embed_dim to the packed width 2 * hidden_dim; the half keeps it exact
        mlp_ratio=(2 * hidden_dim + 0.5) / embed_dim,
        init_values=1e-5,
        norm_layer=partial(nn.LayerNorm, eps=norm_eps),
        act_layer=nn.SiLU,
        mlp_layer=SwiGLUPacked,
    )
    side = input_size // patch_size
    return Dinov2Encoder(
        trunk,
        name=name,
        embed_dim=embed_dim,
        num_prefix_tokens=1,
        grid_size=(side, side),
        info=EncoderInfo(
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            input_size=input_size,
            resize_mode="bicubic",
            activation="silu",
            source="DINOv2, arXiv:2304.07193; github.com/facebookresearch/dinov2; timm's VisionTransformer",
            license="Apache-2.0",
            hub_id="facebook/dinov2-giant",
        ),
        trainable=trainable,
    )
