"""EVA's ViT-g, the vision tower of BLIP-2."""

from __future__ import annotations

from collections import OrderedDict

import torch
from einops import rearrange
from torch import Tensor, nn

from sphinxkit.encoders.layers import INIT_STD, attend


class _VisionEmbeddings(nn.Module):
    """Patch convolution with bias, class token and positions: (B, 3, S, S) -> (B, 1 + H*W, D)."""

    def __init__(self, dim: int, patch_size: int, num_patches: int) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(1, 1, dim) * INIT_STD)
        self.position_embedding = nn.Parameter(torch.randn(1, num_patches + 1, dim) * INIT_STD)
        self.patch_embedding = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Shape: pixels: (B, 3, S, S); return: (B, 1 + H*W, D)."""
        patches = rearrange(self.patch_embedding(pixels), "b d h w -> b (h w) d")
        class_token = self.class_embedding.expand(patches.shape[0], -1, -1)
        return torch.cat([class_token, patches], dim=1) + self.position_embedding


class _VisionAttention(nn.Module):
    """Self-attention of the tower; one projection with one bias gives queries, keys and values."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.projection = nn.Linear(dim, dim)

    def forward(self, hidden: Tensor) -> Tensor:
        """Shape: hidden, return: (B, N, D)."""
        query, key, value = self.qkv(hidden).chunk(3, dim=-1)
        out: Tensor = self.projection(attend(query, key, value, self.num_heads))
        return out


class _VisionBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, norm_eps: float) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.self_attn = _VisionAttention(dim, num_heads)
        self.layer_norm2 = nn.LayerNorm(dim, eps=norm_eps)
        layers = {"fc1": nn.Linear(dim, hidden_dim), "act": nn.GELU(), "fc2": nn.Linear(hidden_dim, dim)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, hidden: Tensor) -> Tensor:
        """Shape: hidden, return: (B, N, D)."""
        hidden = hidden + self.self_attn(self.layer_norm1(hidden))
        out: Tensor = hidden + self.mlp(self.layer_norm2(hidden))
        return out


class EvaVisionTower(nn.Module):
    """EVA's ViT as BLIP-2 uses it: pre-norm blocks, no norm before them, the last norm on every token.

    Args:
        image_size: Side of the input in pixels.
        patch_size: Side of a patch in pixels.
        embed_dim: Width D.
        num_layers: Blocks.
        num_heads: Attention heads.
        hidden_dim: Width of the feed-forward layers.
        norm_eps: Epsilon of every LayerNorm.
    Shape:
        pixels: (B, 3, image_size, image_size)
        return: (B, 1 + H*W, D), class token first
    Source: EVA, arXiv:2211.07636; BLIP-2, arXiv:2301.12597, section 3.1.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        embed_dim: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.embeddings = _VisionEmbeddings(embed_dim, patch_size, (image_size // patch_size) ** 2)
        blocks = [_VisionBlock(embed_dim, num_heads, hidden_dim, norm_eps) for _ in range(num_layers)]
        self.encoder = nn.Sequential(OrderedDict(layers=nn.Sequential(*blocks)))
        self.post_layernorm = nn.LayerNorm(embed_dim, eps=norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """Tokens of a batch of views. Shape: as the class."""
        out: Tensor = self.post_layernorm(self.encoder(self.embeddings(pixels)))
        return out
