"""Interface and registry of tilers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from sphinxkit.registry import Registry


class Tiler(Protocol):
    """Protocol of tilers; ``GridTiler`` implements it."""

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the image that ``tile`` takes."""
        ...

    @property
    def num_views(self) -> int:
        """Views of one image, V."""
        ...

    @property
    def is_tile(self) -> Sequence[bool]:
        """For each view whether it is a sub-image; a view of the whole image is none."""
        ...

    def tile(self, pixels: Tensor, tile_size: int | None = None) -> Tensor:
        """Cut images into views.

        Args:
            pixels: CLIP-normalised.
            tile_size: Side T of a view in pixels; None: the tiler's own.
        Shape:
            pixels: (B, 3, H, W)
            return: (B, V, 3, T, T)
        """
        ...


registry: Registry[Tiler] = Registry("tiler")
register = registry.register
create = registry.build
names = registry.names
