"""Pillow's bicubic resize of a padded image, one axis at a time, without resizing the padding.

Pillow resizes 8-bit images in two passes, first along x, then along y, and rounds to 8 bits after each. So a pass can
be done on the real rows or columns alone and the padding put in afterwards, as long as every result that has both
padding and image below its filter is computed from both. Source: Pillow, src/libImaging/Resample.c.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, floor

import torch
from PIL import Image

SUPPORT = 2.0  # of the bicubic filter; Resample.c, BICUBIC
CUBIC_A = -0.5  # its parameter; Resample.c, bicubic_filter
PRECISION_BITS = 22  # of the fixed-point weights: 32 - 8 - 2; Resample.c
STRIP = 128  # rows per piece when a pass runs over the padding, too: keeps a piece in the cache (our choice)


@dataclass(frozen=True)
class Window:
    """The part of a pass that must be computed: output [first, last) from padded input [low, high)."""

    first: int
    last: int
    low: int
    high: int


def resize_axis(
    image: Image.Image, axis: int, side: int, offset: int, size: int, color: tuple[int, int, int]
) -> tuple[Image.Image, int]:
    """Resize one axis of an image as if it were padded to ``side`` first.

    Args:
        image: RGB.
        axis: 0 for x, 1 for y.
        side: Length of the padded axis.
        offset: Where the image starts on it.
        size: Length of the resized axis.
        color: Of the padding.
    Returns:
        The resized part of the axis that is not plain padding, and where it starts on the resized axis.
    """
    window = resize_window(side, offset, image.size[axis], size)
    length, count = window.high - window.low, window.last - window.first
    whole = length == side and count == size
    start, stop = (0.0, float(side)) if whole else _box(window, side, size)
    across = image.size[1 - axis]
    # a pass along x does not mix rows, so it can go strip by strip; one along y is small already
    strip = STRIP if axis == 0 and length != image.size[0] else across
    result = Image.new("RGB", _pair(axis, count, across)) if strip < across else None
    for begin in range(0, across, strip):
        end = min(begin + strip, across)
        piece = image
        if length != image.size[axis]:
            piece = Image.new("RGB", _pair(axis, length, end - begin), color)
            part = image.crop((0, begin, image.width, end)) if strip < across else image
            piece.paste(part, _pair(axis, offset - window.low, 0))
        resized = piece.resize(
            _pair(axis, count, end - begin),
            Image.Resampling.BICUBIC,
            box=(start, 0.0, stop, end - begin) if axis == 0 else (0.0, start, end - begin, stop),
        )
        if result is None:
            return resized, window.first
        result.paste(resized, _pair(axis, 0, begin))
    return (result or image), window.first


@lru_cache(maxsize=256)
def resize_window(side: int, offset: int, length: int, size: int) -> Window:
    """The smallest part of a pass that is safe to compute alone; everything if none is.

    Pillow takes the part as a box in float32 and derives the same scale and, up to float64 rounding, the same filter
    positions from it when the box's ends are exact. They are when ``first`` and ``last`` are multiples of the size's
    odd factor. Where the size is a power of two the positions are exact, too; elsewhere their rounding could move a
    fixed-point weight that lies on the edge between two integers, and then the whole axis is resized.
    """
    everything = Window(0, size, 0, side)
    if length == side:
        return everything
    scale = side / size
    reach = SUPPORT * max(scale, 1.0)
    odd = size // (size & -size)
    first = max(0, floor((offset - reach) / scale - 1.5)) // odd * odd
    last = min(size, ceil((ceil((offset + length + reach) / scale + 1.5)) / odd) * odd)
    low = max(0, floor(first * scale - reach) - 2)
    high = min(side, ceil(last * scale + reach) + 2)
    window = Window(first, last, low, high)
    if (high - low) == side or not all(map(_is_float32, (*_box(window, side, size), (last - first) * side / size))):
        return everything
    if odd > 1 and _is_on_edge(first, last, side, scale):
        return everything
    return window


def _box(window: Window, side: int, size: int) -> tuple[float, float]:
    return window.first * side / size - window.low, window.last * side / size - window.low


def _is_float32(value: float) -> bool:
    return bool(struct.unpack("f", struct.pack("f", value))[0] == value)


def _is_on_edge(first: int, last: int, side: int, scale: float) -> bool:
    """Whether rounding errors in the filter positions could change a fixed-point weight."""
    stretch = max(scale, 1.0)
    centers = (torch.arange(first, last, dtype=torch.float64, device="cpu") + 0.5) * scale
    taps = torch.arange(-ceil(SUPPORT * stretch) - 1, ceil(SUPPORT * stretch) + 2, dtype=torch.float64, device="cpu")
    places = centers.floor()[:, None] + taps
    x = ((places - centers[:, None] + 0.5) / stretch).abs()
    near = ((CUBIC_A + 2) * x - (CUBIC_A + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * CUBIC_A
    weights = torch.where(x < 1, near, torch.where(x < SUPPORT, far, 0.0))
    weights = torch.where((places >= 0) & (places < side), weights, 0.0)
    weights = weights / weights.sum(dim=1, keepdim=True) * 2**PRECISION_BITS
    # A position is off by at most 4 units in the last place of ``side``; the filter's slope is below 1.2, and twice
    # that covers the normalisation by the weights' sum. The rest is float64 noise of the weights themselves.
    margin = 2 * 1.2 * 4 * side * 2.0**-52 / stretch**2 * 2**PRECISION_BITS + 2.0**-26
    return bool(((weights.abs() % 1 - 0.5).abs() < margin).any())


def _pair(axis: int, along: int, across: int) -> tuple[int, int]:
    return (along, across) if axis == 0 else (across, along)
