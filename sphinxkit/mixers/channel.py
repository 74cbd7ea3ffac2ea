"""Mixing encoders along the channel axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from sphinxkit.errors import RegistryError, ShapeError
from sphinxkit.features import VisionFeatures, check_grid
from sphinxkit.mixers.base import register
from sphinxkit.mixers.resample import RESAMPLE_MODES, pool_patches, resample_patches
from sphinxkit.registry import suggest

# Longest side of a grid in patches, our choice: a view of 3584 pixels in patches of 14. Beyond it a typing error costs
# gigabytes.
MAX_GRID_SIDE = 256
PREFIX_MODES = ("error", "first", "mean", "drop")


@register("channel")
class ChannelMixer(nn.Module):
    """Concatenate encoder features along the channel axis, token by token.

    Args:
        embed_dims: Width of each encoder, in order; the output width is their sum.
        grid: Common (H, W) in patches, 256 a side at most; features on another grid are resampled first. None: all
            features must come on one grid, which is kept.
        resample: "nearest" (repeats tokens) or "bilinear".
        prefix: Policy for prefix tokens (tokens without an image position). "error": every encoder must bring the same
            number, and they are concatenated one by one. "first": the first of each encoder (a class token before
            registers). "mean": the mean of each encoder's. "drop": none. With "first" and "mean" an encoder without
            prefix tokens gives the mean of its patches, as SPHINX's ConvNeXt does, so there is always exactly one.
        tile_pool: Sub-image crops have their patches averaged in blocks of this side; 2 in SPHINX-1k "pooled".
    Shape:
        features: one VisionFeatures per encoder, patches (B, H_i*W_i, D_i), prefix (B, P_i, D_i)
        return: VisionFeatures, patches (B, H*W, sum D_i), prefix (B, P, sum D_i); for crops H and W over ``tile_pool``
    Raises:
        ShapeError: The number or width of the features differs from ``embed_dims`` (the message names both); batches,
            grids or prefix counts do not fit together; ``tile_pool`` does not divide the grid.
        RegistryError: Unknown ``resample`` or ``prefix``.
    Source: SPHINX, arXiv:2311.07575, section 3.1; LLaMA2-Accessory, accessory/model/LLM/llama_ens5.py, encode_image.
    """

    def __init__(
        self,
        embed_dims: Sequence[int],
        grid: tuple[int, int] | None = None,
        resample: Literal["nearest", "bilinear"] = "nearest",
        prefix: Literal["error", "first", "mean", "drop"] = "error",
        tile_pool: int = 1,
    ) -> None:
        super().__init__()
        self.embed_dims = tuple(embed_dims)
        self.grid = None if grid is None else check_grid("channel mixer", grid)
        self.resample: str = resample
        self.prefix: str = prefix
        self.tile_pool = tile_pool
        if not self.embed_dims or min(self.embed_dims) < 1:
            raise ShapeError(f"channel mixer: expected at least one positive width, got embed_dims={self.embed_dims}")
        if self.grid is not None and max(self.grid) > MAX_GRID_SIDE:
            raise ShapeError(f"channel mixer: grid sides may be {MAX_GRID_SIDE} patches at most, got {self.grid}")
        if tile_pool < 1 or (self.grid is not None and (self.grid[0] % tile_pool or self.grid[1] % tile_pool)):
            raise ShapeError(f"channel mixer: tile_pool={tile_pool} does not divide the grid {self.grid}")
        for option, value, known in (("resample", resample, RESAMPLE_MODES), ("prefix", prefix, PREFIX_MODES)):
            if value not in known:
                raise RegistryError(
                    f"channel mixer: unknown {option} {value!r}{suggest(value, known) or '.'} Known: {', '.join(known)}"
                )

    @property
    def embed_dim(self) -> int:
        """Width of the mixed tokens: the sum of ``embed_dims``."""
        return sum(self.embed_dims)

    def forward(self, features: Sequence[VisionFeatures], *, is_tile: bool = False) -> VisionFeatures:
        """Mix one feature per encoder. Shape: as the class.

        Args:
            features: In the order of ``embed_dims``.
            is_tile: These views are sub-image crops: patches are pooled by ``tile_pool``.
        Raises:
            ShapeError: See the class.
        """
        widths = tuple(feature.embed_dim for feature in features)
        if widths != self.embed_dims:
            raise ShapeError(
                f"channel mixer: expected {len(self.embed_dims)} features of widths {self.embed_dims}, "
                f"got {len(widths)} of widths {widths}"
            )
        batches = [feature.batch_size for feature in features]
        if len(set(batches)) > 1:
            raise ShapeError(f"channel mixer: features differ in batch size: {batches}")
        grid = self._common_grid([feature.grid for feature in features])
        patches = torch.cat([resample_patches(f.patches, f.grid, grid, self.resample) for f in features], dim=2)
        prefix = torch.cat(self._prefixes(features), dim=2)
        if is_tile and self.tile_pool > 1:
            patches = pool_patches(patches, grid, self.tile_pool)
        return VisionFeatures(prefix, patches, self._pooled(grid, is_tile))

    def num_tokens(
        self, prefix_counts: Sequence[int], grids: Sequence[tuple[int, int]], *, is_tile: bool = False
    ) -> int:
        """Tokens of one mixed view, P + H*W.

        Args:
            prefix_counts: P_i of each encoder.
            grids: (H_i, W_i) of each encoder.
            is_tile: The view is a sub-image crop.
        Raises:
            ShapeError: Grids or prefix counts do not fit together.
        """
        height, width = self._pooled(self._common_grid(list(grids)), is_tile)
        return self._prefix_count(prefix_counts) + height * width

    def extra_repr(self) -> str:
        """The options, for ``repr``."""
        return (
            f"embed_dims={self.embed_dims}, grid={self.grid}, resample={self.resample!r}, prefix={self.prefix!r}, "
            f"tile_pool={self.tile_pool}"
        )

    def _common_grid(self, grids: list[tuple[int, int]]) -> tuple[int, int]:
        if (0, 0) in grids:
            raise ShapeError(
                f"channel mixer: feature {grids.index((0, 0))} has no patches (grid (0, 0)); mix such tokens, a "
                "Q-Former's for instance, along the sequence in a branch of their own"
            )
        if self.grid is not None:
            return self.grid
        if len(set(grids)) > 1:
            raise ShapeError(f"channel mixer: features come on the grids {grids}; give grid=(H, W) to resample them")
        return grids[0]

    def _pooled(self, grid: tuple[int, int], is_tile: bool) -> tuple[int, int]:
        return (grid[0] // self.tile_pool, grid[1] // self.tile_pool) if is_tile else grid

    def _prefix_count(self, counts: Sequence[int]) -> int:
        if self.prefix == "drop":
            return 0
        if self.prefix != "error":
            return 1
        if len(set(counts)) > 1:
            raise ShapeError(
                f"channel mixer: features have {list(counts)} prefix tokens; say what to do with "
                "prefix='first', 'mean' or 'drop'"
            )
        return counts[0]

    def _prefixes(self, features: Sequence[VisionFeatures]) -> list[Tensor]:
        prefixes = [feature.prefix for feature in features]
        count = self._prefix_count([prefix.shape[1] for prefix in prefixes])
        if self.prefix in ("drop", "error"):
            return [prefix[:, :count] for prefix in prefixes]
        return [
            feature.patches.mean(dim=1, keepdim=True)
            if feature.prefix.shape[1] == 0
            else (feature.prefix[:, :1] if self.prefix == "first" else feature.prefix.mean(dim=1, keepdim=True))
            for feature in features
        ]
