"""Bar charts with a label and a value at every bar."""

from __future__ import annotations

from sphinxkit.nano.world.font import ADVANCE, GLYPH_HEIGHT, text_mask
from sphinxkit.nano.world.palette import COLORS
from sphinxkit.nano.world.rng import Rng
from sphinxkit.nano.world.scene import Bar, Chart, Rect
from sphinxkit.nano.world.words import draw_word

LEAST_BARS, MOST_BARS = 2, 5  # one fewer where they stand side by side, for the labels
HIGHEST_VALUE = 20
LABEL_LETTERS = 3


def _margin(width: int, height: int) -> int:
    return max(3, min(width, height) * 5 // 100)


def draw_chart(rng: Rng, width: int, height: int, scale: int, held_out: bool) -> Chart:
    """A bar chart that fills its picture; no two bars have the same label or the same value.

    Args:
        rng: Random choices.
        width: Width of the picture, in pixels.
        height: Height of the picture, in pixels.
        scale: Pixels per pixel of the font.
        held_out: Whether the labels are words that training never sees.
    """
    is_horizontal = rng.chance(60)
    side_by_side = min(MOST_BARS - 1, (width - 2 * _margin(width, height)) // (ADVANCE * LABEL_LETTERS))
    count = rng.between(LEAST_BARS, MOST_BARS if is_horizontal else side_by_side)
    labels: list[str] = []
    while len(labels) < count:
        label = draw_word(rng, held_out, longest=LABEL_LETTERS, numerals=False)
        if label not in labels:
            labels.append(label)
    values = rng.shuffled(range(1, HIGHEST_VALUE + 1))[:count]
    colors = rng.shuffled(tuple(COLORS))[:count]
    draw = _horizontal if is_horizontal else _vertical
    return draw(width, height, scale, labels, values, colors)


def _horizontal(width: int, height: int, scale: int, labels: list[str], values: list[int], colors: list[str]) -> Chart:
    margin = _margin(width, height)
    pitch = (height - 2 * margin) // len(labels)
    while scale > 1 and (pitch < (GLYPH_HEIGHT + 2) * scale or 40 * scale > width // 2 + 24):
        scale -= 1
    label_width = max(text_mask(label, scale).shape[1] for label in labels)
    value_width = max(text_mask(str(value), scale).shape[1] for value in values)
    base = margin + label_width + 2 * scale
    longest = width - margin - value_width - 2 * scale - base
    bars = []
    for index, (label, value, color) in enumerate(zip(labels, values, colors, strict=True)):
        middle = margin + index * pitch + pitch // 2
        half = max(2, pitch * 3 // 10)
        rect = Rect(base, middle - half, base + max(1, longest * value // HIGHEST_VALUE), middle + half)
        text_top = middle - GLYPH_HEIGHT * scale // 2
        label_left = base - 2 * scale - text_mask(label, scale).shape[1]
        bars.append(Bar(label, value, color, rect, (label_left, text_top), (rect.x2 + 2 * scale, text_top)))
    axis = Rect(base - 1, margin, base, height - margin)
    return Chart(True, scale, tuple(bars), axis)


def _vertical(width: int, height: int, scale: int, labels: list[str], values: list[int], colors: list[str]) -> Chart:
    margin = _margin(width, height)
    pitch = (width - 2 * margin) // len(labels)
    while scale > 1 and pitch < max(text_mask(label, scale).shape[1] for label in labels) + 2 * scale:
        scale -= 1
    line = (GLYPH_HEIGHT + 2) * scale
    base = height - margin - line
    longest = base - margin - line
    bars = []
    for index, (label, value, color) in enumerate(zip(labels, values, colors, strict=True)):
        middle = margin + index * pitch + pitch // 2
        half = max(2, pitch * 3 // 10)
        rect = Rect(middle - half, base - max(1, longest * value // HIGHEST_VALUE), middle + half, base)
        label_at = (middle - text_mask(label, scale).shape[1] // 2, base + 2 * scale)
        value_at = (middle - text_mask(str(value), scale).shape[1] // 2, rect.y1 - line)
        bars.append(Bar(label, value, color, rect, label_at, value_at))
    return Chart(False, scale, tuple(bars), Rect(margin, base, width - margin, base + 1))
