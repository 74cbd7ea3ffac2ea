"""BLIP-2's Q-Former on its EVA tower: a fixed number of query tokens that read an image."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sphinxkit.encoders.base import Encoder, EncoderInfo, check_depth, check_divisible, check_positive, register
from sphinxkit.encoders.eva import EvaVisionTower
from sphinxkit.encoders.formats.base import SPHINXKIT, WeightFormat
from sphinxkit.encoders.formats.blip2 import BLIP2_FORMATS
from sphinxkit.encoders.layers import INIT_STD, attend, count_layers
from sphinxkit.encoders.positions import grid_side, resample_positions
from sphinxkit.features import VisionFeatures


class _QueryAttention(nn.Module):
    """Attention with separate projections; keys and values may come from another width (cross-attention)."""

    def __init__(self, dim: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(context_dim, dim)
        self.value = nn.Linear(context_dim, dim)

    def forward(self, hidden: Tensor, context: Tensor) -> Tensor:
        """Shape: hidden, return: (B, N, D); context: (B, M, C)."""
        return attend(self.query(hidden), self.key(context), self.value(context), self.num_heads)


class _ResidualOutput(nn.Module):
    """Projection, residual, then norm: the end of every post-norm sub-layer."""

    def __init__(self, in_dim: int, dim: int, norm_eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(in_dim, dim)
        self.LayerNorm = nn.LayerNorm(dim, eps=norm_eps)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """Shape: hidden: (B, N, in_dim); residual, return: (B, N, D)."""
        out: Tensor = self.LayerNorm(self.dense(hidden) + residual)
        return out


class _QueryAttentionBlock(nn.Module):
    def __init__(self, dim: int, context_dim: int, num_heads: int, norm_eps: float) -> None:
        super().__init__()
        self.attention = _QueryAttention(dim, context_dim, num_heads)
        self.output = _ResidualOutput(dim, dim, norm_eps)

    def forward(self, hidden: Tensor, context: Tensor) -> Tensor:
        """Shape: hidden, return: (B, N, D); context: (B, M, C)."""
        out: Tensor = self.output(self.attention(hidden, context), hidden)
        return out


class _QueryLayer(nn.Module):
    """Post-norm BERT layer on the queries, with cross-attention to the image if ``context_dim`` is given."""

    def __init__(self, dim: int, context_dim: int | None, num_heads: int, hidden_dim: int, norm_eps: float) -> None:
        super().__init__()
        self.attention = _QueryAttentionBlock(dim, dim, num_heads, norm_eps)
        if context_dim is not None:
            self.crossattention = _QueryAttentionBlock(dim, context_dim, num_heads, norm_eps)
        self.has_cross_attention = context_dim is not None
        self.intermediate_query = nn.Sequential(OrderedDict(dense=nn.Linear(dim, hidden_dim), act=nn.GELU()))
        self.output_query = _ResidualOutput(hidden_dim, dim, norm_eps)

    def forward(self, hidden: Tensor, image_tokens: Tensor) -> Tensor:
        """Shape: hidden, return: (B, N, D); image_tokens: (B, M, C)."""
        hidden = self.attention(hidden, hidden)
        if self.has_cross_attention:
            hidden = self.crossattention(hidden, image_tokens)
        out: Tensor = self.output_query(self.intermediate_query(hidden), hidden)
        return out


class QFormer(nn.Module):
    """Post-norm BERT layers on query tokens; every n-th layer, the first included, attends to an image's tokens.

    It has no dropout: SPHINX runs it frozen, and a trainable copy is deterministic.

    Args:
        embed_dim: Width D of the queries.
        context_dim: Width of the image's tokens.
        num_layers: Layers.
        num_heads: Attention heads.
        hidden_dim: Width of the feed-forward layers.
        cross_attention_frequency: n; layers 0, n, 2n, ... have cross-attention.
        norm_eps: Epsilon of every LayerNorm.
    Shape:
        queries: (B, N, D)
        image_tokens: (B, M, context_dim)
        return: (B, N, D)
    Source: BLIP-2, arXiv:2301.12597, section 3.1.
    """

    def __init__(
        self,
        embed_dim: int,
        context_dim: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        cross_attention_frequency: int,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(embed_dim, eps=norm_eps)
        contexts = [context_dim if index % cross_attention_frequency == 0 else None for index in range(num_layers)]
        layers = [_QueryLayer(embed_dim, context, num_heads, hidden_dim, norm_eps) for context in contexts]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    def forward(self, queries: Tensor, image_tokens: Tensor) -> Tensor:
        """Apply the Q-Former: queries attend to the image tokens. Shape: as the class."""
        hidden: Tensor = self.layernorm(queries)
        for layer in self.encoder.get_submodule("layer").children():
            hidden = layer(hidden, image_tokens)
        return hidden


class Blip2Trunk(nn.Module):
    """Learnt queries, vision tower and Q-Former.

    Args:
        vision_model: Vision tower; returns the image tokens.
        qformer: Q-Former; reads the image tokens.
        num_query_tokens: Learnt queries, N.
        embed_dim: Width D of the queries.
    Shape:
        pixels: (B, 3, S, S)
        return: (B, N, D)
    """

    def __init__(self, vision_model: EvaVisionTower, qformer: QFormer, num_query_tokens: int, embed_dim: int) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.randn(1, num_query_tokens, embed_dim) * INIT_STD)
        self.vision_model = vision_model
        self.qformer = qformer

    def forward(self, pixels: Tensor) -> Tensor:
        """Apply the learnt queries to each view. Shape: as the class."""
        image_tokens = self.vision_model(pixels)
        out: Tensor = self.qformer(self.query_tokens.expand(image_tokens.shape[0], -1, -1), image_tokens)
        return out


class QFormerEncoder(Encoder):
    """BLIP-2's query tokens as a prefix; there are no patches.

    Shape:
        pixels: (B, 3, S, S)
        return: prefix (B, N, D), patches (B, 0, D), grid (0, 0)
    Source: BLIP-2, arXiv:2301.12597, section 3.1.
    """

    weight_formats: ClassVar[tuple[WeightFormat, ...]] = (SPHINXKIT, *BLIP2_FORMATS)
    position_table: ClassVar[str] = "trunk.vision_model.embeddings.position_embedding"

    def resample_positions(self, positions: Tensor, grid: int) -> Tensor:
        """Bicubic, not antialiased. Source: salesforce/LAVIS, lavis/models/eva_vit.py, interpolate_pos_embed.

        Shape:
                positions: (1, 1 + n*n, D)
                return: (1, 1 + grid*grid, D)
        """
        return resample_positions(positions, grid, antialias=False)

    def unseen_options(self) -> Mapping[str, Any]:
        """As :meth:`Encoder.unseen_options`."""
        vision, qformer = self._trunk.vision_model, self._trunk.qformer
        block: Any = next(vision.encoder.get_submodule("layers").children())
        layer: Any = next(qformer.encoder.get_submodule("layer").children())
        return {
            "vision_heads": block.self_attn.num_heads,
            "vision_norm_eps": vision.post_layernorm.eps,
            "num_heads": layer.attention.attention.num_heads,
            "norm_eps": qformer.layernorm.eps,
        }

    @property
    def _trunk(self) -> Any:
        return self.trunk

    @classmethod
    def sizes(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """As :meth:`Encoder.sizes`."""
        vision, qformer = "trunk.vision_model.", "trunk.qformer.encoder.layer."
        patch = shapes[f"{vision}embeddings.patch_embedding.weight"]
        queries = shapes["trunk.query_tokens"]
        return {
            "image_size": grid_side(shapes[cls.position_table][-2], "position table") * patch[-1],
            "patch_size": patch[-1],
            "vision_dim": patch[0],
            "vision_layers": count_layers(shapes, f"{vision}encoder.layers.{{}}."),
            "vision_hidden_dim": shapes[f"{vision}encoder.layers.0.mlp.fc1.weight"][0],
            "embed_dim": queries[-1],
            "num_layers": count_layers(shapes, f"{qformer}{{}}."),
            "hidden_dim": shapes[f"{qformer}0.intermediate_query.dense.weight"][0],
            "num_query_tokens": queries[-2],
        }

    def encode(self, pixels: Tensor) -> VisionFeatures:
        """Run the network on prepared pixels. Shape: as the class."""
        queries = self.trunk(pixels)
        return VisionFeatures(prefix=queries, patches=queries[:, :0], grid=(0, 0))


@register("blip2_qformer")
def blip2_qformer(
    image_size: int = 224,
    patch_size: int = 14,
    vision_dim: int = 1408,
    vision_layers: int = 39,
    vision_heads: int = 16,
    vision_hidden_dim: int = 6144,
    vision_norm_eps: float = 1e-6,
    embed_dim: int = 768,
    num_layers: int = 12,
    num_heads: int = 12,
    hidden_dim: int = 3072,
    num_query_tokens: int = 32,
    cross_attention_frequency: int = 2,
    norm_eps: float = 1e-12,
    trainable: bool = False,
) -> QFormerEncoder:
    """BLIP-2's first stage: EVA ViT-g/14 (without its last block) and Q-Former; random weights.

    Args:
        image_size: Side of the input in pixels.
        patch_size: Side of a patch in pixels.
        vision_dim: Width of the tower.
        vision_layers: Blocks of the tower.
        vision_heads: Attention heads of the tower.
        vision_hidden_dim: Width of the tower's feed-forward layers.
        vision_norm_eps: Epsilon of the tower's LayerNorms.
        embed_dim: Width of the queries.
        num_layers: Layers of the Q-Former.
        num_heads: Attention heads of the Q-Former.
        hidden_dim: Width of the Q-Former's feed-forward layers.
        num_query_tokens: Learnt queries.
        cross_attention_frequency: n; layers 0, n, 2n, ... of the Q-Former attend to the image.
        norm_eps: Epsilon of the Q-Former's LayerNorms.
        trainable: Normal module instead of frozen.
    Raises:
        ShapeError: ``image_size`` is no multiple of ``patch_size``, a width of its heads, or
            ``cross_attention_frequency`` is below 1.
    Source: BLIP-2, arXiv:2301.12597, section 3.1; numbers: Salesforce/blip2-opt-2.7b, config.json.
    """
    name = "blip2_qformer"
    check_depth(name, num_layers, vision_layers)
    check_divisible(name, "image_size", image_size, "patch_size", patch_size)
    check_divisible(name, "vision_dim", vision_dim, "vision_heads", vision_heads)
    check_divisible(name, "embed_dim", embed_dim, "num_heads", num_heads)
    check_positive(name, hidden_dim=hidden_dim, vision_hidden_dim=vision_hidden_dim, num_query_tokens=num_query_tokens)
    check_positive(name, cross_attention_frequency=cross_attention_frequency)
    tower = EvaVisionTower(
        image_size, patch_size, vision_dim, vision_layers, vision_heads, vision_hidden_dim, vision_norm_eps
    )
    qformer = QFormer(embed_dim, vision_dim, num_layers, num_heads, hidden_dim, cross_attention_frequency, norm_eps)
    return QFormerEncoder(
        Blip2Trunk(tower, qformer, num_query_tokens, embed_dim),
        name=name,
        embed_dim=embed_dim,
        num_prefix_tokens=num_query_tokens,
        grid_size=(0, 0),
        info=EncoderInfo(
            input_size=image_size,
            resize_mode="bicubic",
            activation="gelu",
            source="BLIP-2, arXiv:2301.12597; EVA, arXiv:2211.07636; github.com/salesforce/LAVIS",
            license="MIT",
            weights="hf://Salesforce/blip2-opt-2.7b",  # its vision and Q-Former tensors alone are read
        ),
        trainable=trainable,
    )
