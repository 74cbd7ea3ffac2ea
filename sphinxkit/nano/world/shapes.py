"""Shapes as masks of any size, by integer arithmetic alone."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sphinxkit.errors import DataError
from sphinxkit.nano.world.font import Mask, crop

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring", "star", "heart")

# Corners in units of a thousandth of the shape's side, x right and y down.
_POLYGONS = {
    "square": ((0, 0), (1000, 0), (1000, 1000), (0, 1000)),
    "triangle": ((500, 0), (1000, 1000), (0, 1000)),
    "diamond": ((500, 0), (1000, 500), (500, 1000), (0, 500)),
    "cross": (
        *((340, 0), (660, 0), (660, 340), (1000, 340), (1000, 660), (660, 660)),
        *((660, 1000), (340, 1000), (340, 660), (0, 660), (0, 340), (340, 340)),
    ),
    "star": (
        *((500, 0), (624, 363), (1000, 382), (700, 612), (809, 1000)),
        *((500, 780), (191, 1000), (300, 612), (0, 382), (376, 363)),
    ),
    "heart": (
        *((500, 210), (590, 75), (720, 0), (870, 30), (980, 160), (1000, 330), (930, 520)),
        *((760, 740), (500, 1000), (240, 740), (70, 520), (0, 330), (20, 160), (130, 30), (280, 0), (410, 75)),
    ),
}
_RING_HOLE = (11, 20)  # inner over outer diameter; our choice


def _disc(side: int, numerator: int = 1, denominator: int = 1) -> Mask:
    """Pixels whose centre is in the disc with ``numerator / denominator`` of the side as its diameter."""
    twice = 2 * np.arange(side, dtype=np.int64) + 1 - side
    squared = twice[:, None] ** 2 + twice[None, :] ** 2
    inside: NDArray[np.bool_] = squared * denominator**2 <= (side * numerator) ** 2
    return inside


def _polygon(side: int, corners: tuple[tuple[int, int], ...]) -> Mask:
    """Pixels whose centre is in the polygon, by the even-odd rule."""
    centre = (2 * np.arange(side, dtype=np.int64) + 1) * 1000  # in units where a corner is 2 * side * thousandths
    x, y = centre[None, :], centre[:, None]
    inside = np.zeros((side, side), dtype=np.bool_)
    for index, end in enumerate(corners):
        (x0, y0), (x1, y1) = ((2 * side * value for value in corner) for corner in (corners[index - 1], end))
        if y0 == y1:
            continue
        spans = (y0 <= y) != (y1 <= y)
        # right of the centre: x < x0 + (y - y0) (x1 - x0) / (y1 - y0), multiplied out
        left, right = (x - x0) * (y1 - y0), (y - y0) * (x1 - x0)
        inside ^= spans & ((left < right) if y1 > y0 else (left > right))
    return inside


@lru_cache(maxsize=4096)
def shape_mask(shape: str, side: int) -> Mask:
    """A shape's pixels, cropped to it.

    Args:
        shape: One of ``SHAPES``.
        side: Side of the square that it is drawn in, in pixels.
    Raises:
        DataError: The shape is unknown, or the side less than 5 pixels.
    Shape:
        return: (height, width) bool, both at most ``side``; every outer row and column has a pixel
    """
    if shape not in SHAPES:
        raise DataError(f"shapes: there is no {shape!r}; there are {', '.join(SHAPES)}")
    if side < 5:
        raise DataError(f"shapes: a side of {side} pixels is too small, at least 5 are needed")
    if shape in _POLYGONS:
        mask = _polygon(side, _POLYGONS[shape])
    else:
        mask = _disc(side)
        if shape == "ring":
            mask &= ~_disc(side, *_RING_HOLE)
    mask = np.ascontiguousarray(crop(mask))
    mask.setflags(write=False)
    return mask
