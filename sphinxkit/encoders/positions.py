"""Tables of learnt positions brought to another grid, by the rule that each family was published with."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from sphinxkit.errors import ShapeError


def grid_side(num_tokens: int, where: str) -> int:
    """Side of the square grid of a table of a class token and ``num_tokens - 1`` patches.

    Raises:
        ShapeError: The patches are no square.
    """
    side = math.isqrt(max(num_tokens - 1, 0))
    if side < 1 or side * side != num_tokens - 1:
        raise ShapeError(f"{where}: expected positions of a class token and a square grid, got {num_tokens}")
    return side


def resample_positions(positions: Tensor, grid: int, *, antialias: bool, offset: float = 0.0) -> Tensor:
    """Bring a square table of positions to another grid, bicubic and in float32; the class token's row stays.

    A table of the right size is returned as it is.

    Args:
        positions: Class token's position first, then the patches' row-major.
        grid: Side of the target grid in patches.
        antialias: Whether to average over more than the nearest cells where the table shrinks.
        offset: Added to ``grid`` before it is divided by the table's side, where the quotient is used as the scale of
            the sampling coordinates (DINOv2); 0: the coordinates are scaled by the sizes themselves.
    Shape:
        positions: (1, 1 + n*n, D)
        return: (1, 1 + grid*grid, D)
    Raises:
        ShapeError: The patches are no square.
    """
    side = grid_side(positions.shape[1], "position table")
    if side == grid:
        return positions
    table = rearrange(positions[:, 1:].float(), "1 (h w) d -> 1 d h w", h=side)
    if offset:
        scale = (grid + offset) / side
        table = F.interpolate(
            table, scale_factor=(scale, scale), mode="bicubic", align_corners=False, antialias=antialias
        )
    else:
        table = F.interpolate(table, size=(grid, grid), mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([positions[:, :1], rearrange(table, "1 d h w -> 1 (h w) d").to(positions.dtype)], dim=1)
