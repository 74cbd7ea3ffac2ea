"""What encoders give and mixers take: one batch of vision tokens with its grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sphinxkit.errors import ShapeError


def check_grid(where: str, grid: object, at_least: int = 1) -> tuple[int, int]:
    """The grid as a pair of ints.

    Args:
        where: Who asks, for the message.
        grid: What came.
        at_least: Smallest side taken.
    Raises:
        ShapeError: Not a pair (H, W) of ints of at least ``at_least``.
    """
    sides = tuple(grid) if isinstance(grid, (tuple, list)) else ()
    is_int = all(isinstance(side, int) and not isinstance(side, bool) for side in sides)
    if len(sides) != 2 or not is_int or min(sides) < at_least:
        raise ShapeError(f"{where}: grid must be a pair (H, W) of ints of at least {at_least}, got {grid!r}")
    return sides[0], sides[1]


@dataclass(frozen=True, slots=True)
class VisionFeatures:
    """Vision tokens of a batch of views, prefix and patches apart.

    A ViT's prefix is its class token, a ConvNeXt's the mean of its map; a Q-Former has a prefix (its queries)
    and no patches. Patches are row-major on ``grid``.

    Args:
        prefix: Tokens without a place in the image; P may be 0.
        patches: Tokens on the grid.
        grid: (H, W) in patches, (0, 0) when there are none.
    Shape:
        prefix: (B, P, D)
        patches: (B, H*W, D)
    Raises:
        ShapeError: The tensors disagree with each other or with ``grid`` (the message names both).
    """

    prefix: Tensor
    patches: Tensor
    grid: tuple[int, int]

    def __post_init__(self) -> None:
        height, width = check_grid("vision features", self.grid, at_least=0)
        if self.prefix.ndim != 3 or self.patches.ndim != 3:
            raise ShapeError(
                "vision features: expected prefix (B, P, D) and patches (B, H*W, D), "
                f"got {tuple(self.prefix.shape)} and {tuple(self.patches.shape)}"
            )
        if self.patches.shape[1] != height * width:
            raise ShapeError(f"vision features: {self.patches.shape[1]} patches do not fill the grid {height}x{width}")
        if self.prefix.shape[0] != self.patches.shape[0] or self.prefix.shape[2] != self.patches.shape[2]:
            raise ShapeError(
                f"vision features: prefix {tuple(self.prefix.shape)} and patches {tuple(self.patches.shape)} "
                "differ in batch or width"
            )

    @property
    def batch_size(self) -> int:
        """Number of views, B."""
        return self.patches.shape[0]

    @property
    def embed_dim(self) -> int:
        """Width of a token, D."""
        return self.patches.shape[2]

    @property
    def num_tokens(self) -> int:
        """Tokens of one view, P + H*W."""
        return self.prefix.shape[1] + self.patches.shape[1]

    def tokens(self) -> Tensor:
        """All tokens in sequence, prefix first.

        Shape:
            return: (B, P + H*W, D)
        """
        return torch.cat([self.prefix, self.patches], dim=1)
