"""Moving patch tokens from one grid to another."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from sphinxkit.errors import RegistryError, ShapeError
from sphinxkit.features import check_grid
from sphinxkit.registry import suggest

RESAMPLE_MODES = ("nearest", "bilinear")


def resample_patches(patches: Tensor, grid: tuple[int, int], size: tuple[int, int], mode: str = "nearest") -> Tensor:
    """Resample row-major patch tokens from ``grid`` to ``size``.

    Args:
        patches: Tokens on ``grid``; returned as they are when the grids are equal.
        grid: (H_in, W_in) in patches.
        size: (H_out, W_out) in patches.
        mode: "nearest" copies token floor(i * in / out) along each axis (8x8 -> 16x16 repeats every token 2x2, as
            SPHINX does with ConvNeXt), bitwise; "bilinear" interpolates (align_corners False, no antialias).
    Shape:
        patches: (B, H_in*W_in, D)
        return: (B, H_out*W_out, D)
    Raises:
        ShapeError: The patches do not fill ``grid``, or a grid is no pair of positive ints.
        RegistryError: Unknown mode.
    Source: LLaMA2-Accessory, accessory/model/LLM/llama_ens5.py, encode_image (ConvNeXt's 8x8 map to 16x16).
    """
    if mode not in RESAMPLE_MODES:
        raise RegistryError(
            f"resample_patches: unknown mode {mode!r}{suggest(mode, RESAMPLE_MODES) or '.'} "
            f"Known: {', '.join(RESAMPLE_MODES)}"
        )
    grid, size = check_grid("resample_patches", grid), check_grid("resample_patches", size)
    _check_patches("resample_patches", patches, grid)
    if grid == size:
        return patches
    if mode == "nearest":
        rows = torch.arange(size[0], device=patches.device) * grid[0] // size[0]
        columns = torch.arange(size[1], device=patches.device) * grid[1] // size[1]
        return patches.index_select(1, (rows[:, None] * grid[1] + columns).flatten())
    maps = rearrange(patches, "b (h w) d -> b d h w", h=grid[0])
    maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    return rearrange(maps, "b d h w -> b (h w) d")


def pool_patches(patches: Tensor, grid: tuple[int, int], factor: int) -> Tensor:
    """Average non-overlapping ``factor`` x ``factor`` blocks of patch tokens.

    With factor 2 this is the bilinear halving (align_corners False) of SPHINX's pooled sub-images.

    Args:
        patches: Row-major tokens.
        grid: (H, W) in patches, both divisible by ``factor``.
        factor: Side of a block, 1 for no change.
    Shape:
        patches: (B, H*W, D)
        return: (B, H*W / factor**2, D)
    Raises:
        ShapeError: ``factor`` does not divide the grid, or the patches do not fill it.
    Source: LLaMA2-Accessory, accessory/model/LLM/llama_ens5p2.py, encode_image.
    """
    grid = check_grid("pool_patches", grid)
    if factor < 1 or grid[0] % factor or grid[1] % factor:
        raise ShapeError(f"pool_patches: a {_show(grid)} grid cannot be pooled in blocks of {factor}x{factor}")
    _check_patches("pool_patches", patches, grid)
    if factor == 1:
        return patches
    return reduce(
        patches, "b (h i w j) d -> b (h w) d", "mean", h=grid[0] // factor, i=factor, w=grid[1] // factor, j=factor
    )


def _check_patches(where: str, patches: Tensor, grid: tuple[int, int]) -> None:
    if patches.ndim != 3 or patches.shape[1] != grid[0] * grid[1]:
        raise ShapeError(
            f"{where}: expected patches (B, {grid[0] * grid[1]}, D) for a {_show(grid)} grid, got "
            f"{tuple(patches.shape)}"
        )


def _show(grid: tuple[int, int]) -> str:
    return f"{grid[0]}x{grid[1]}"
