"""The insides of a page's blocks. Every block reaches all four edges of its extent."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from sphinxkit.nano.world.font import text_mask
from sphinxkit.nano.world.palette import COLORS, DARK, RGB
from sphinxkit.nano.world.rng import Rng
from sphinxkit.nano.world.scene import Block
from sphinxkit.nano.world.shapes import SHAPES, shape_mask

Canvas = NDArray[np.uint8]
INK: RGB = (70, 70, 74)
LINE: RGB = (90, 90, 96)
SHADE: RGB = (198, 202, 210)
TITLE_GAP = 4  # pixels of the font between a title's words


def paint_block(canvas: Canvas, block: Block, tint: RGB) -> None:
    """Paint one block.

    Args:
        canvas: The page, at least as large as the block's place; changed in place.
        block: What to paint.
        tint: The paper's colour, for gaps between words.
    """
    rect = block.rect
    region = canvas[rect.y1 : rect.y2, rect.x1 : rect.x2]
    unit = max(1, min(canvas.shape[:2]) // 56)
    if block.kind == "title":
        _title(region, block)
    else:
        _PAINTERS[block.kind](region, Rng("block", block.noise_seed), unit, tint)


def _title(region: Canvas, block: Block) -> None:
    left = 0
    for word in block.text:
        mask = text_mask(word, block.scale)
        region[: mask.shape[0], left : left + mask.shape[1]][mask] = DARK
        left += mask.shape[1] + TITLE_GAP * block.scale


def _line(row: Canvas, rng: Rng, unit: int, tint: RGB, end: int) -> None:
    """A line of words as dashes: full from the left edge to ``end``, with gaps."""
    row[:, :end] = INK
    x = rng.between(3, 9) * unit
    while x + 2 * unit < end:
        row[:, x : x + unit] = tint
        x += rng.between(4, 10) * unit


def _tops(height: int, unit: int) -> list[int]:
    """Where lines of ``unit`` pixels begin, the first at the top edge, the last at the bottom edge."""
    gaps = max(1, (height - unit) // (2 * unit))
    return [index * (height - unit) // gaps for index in range(gaps + 1)]


def _text(region: Canvas, rng: Rng, unit: int, tint: RGB) -> None:
    width = region.shape[1]
    tops = _tops(region.shape[0], unit)
    for top in tops[:-1]:
        _line(region[top : top + unit], rng, unit, tint, width)
    _line(region[tops[-1] : tops[-1] + unit], rng, unit, tint, width * rng.between(40, 90) // 100)


def _list(region: Canvas, rng: Rng, unit: int, tint: RGB) -> None:
    width = region.shape[1]
    indent = 4 * unit
    tops = _tops(region.shape[0], unit)
    for index, top in enumerate(tops):
        is_item = index == 0 or index == len(tops) - 1 or rng.chance(55)
        if is_item:
            region[top : top + unit, : 2 * unit] = DARK
        end = width if index == 0 else width * rng.between(50, 100) // 100
        _line(region[top : top + unit, indent:], rng, unit, tint, max(unit, end - indent))


def _table(region: Canvas, rng: Rng, unit: int, tint: RGB) -> None:
    height, width, _ = region.shape
    thin = max(1, unit // 2)
    rows, columns = min(rng.between(3, 5), height // (4 * unit)), rng.between(2, 4)
    region[: height // max(rows, 1)] = SHADE
    for index in range(rows + 1):
        y = index * (height - thin) // max(rows, 1)
        region[y : y + thin] = LINE
    for index in range(columns + 1):
        x = index * (width - thin) // columns
        region[:, x : x + thin] = LINE
    for row in range(rows):
        y = (2 * row + 1) * (height - thin) // (2 * rows)
        for column in range(columns):
            left = column * (width - thin) // columns + thin + unit
            right = left + (width // columns - 3 * unit) * rng.between(40, 100) // 100
            region[y : y + unit, left : max(right, left)] = INK


def _figure(region: Canvas, rng: Rng, unit: int, tint: RGB) -> None:
    height, width, _ = region.shape
    thin = max(1, unit // 2)
    names = tuple(COLORS)
    pale = tuple((3 * 235 + channel) // 4 for channel in COLORS[rng.choice(names)])
    region[:] = LINE
    region[thin:-thin, thin:-thin] = pale
    side = min(height, width) * rng.between(50, 75) // 100
    if side >= 5:
        mask = shape_mask(rng.choice(SHAPES), side)
        top, left = (
            (height - mask.shape[0]) // 2,
            rng.between(thin + 1, max(thin + 1, width - mask.shape[1] - thin - 1)),
        )
        region[top : top + mask.shape[0], left : left + mask.shape[1]][mask] = COLORS[rng.choice(names)]


_PAINTERS: Mapping[str, Callable[[Canvas, Rng, int, RGB], None]] = {
    "text": _text,
    "list": _list,
    "table": _table,
    "figure": _figure,
}
