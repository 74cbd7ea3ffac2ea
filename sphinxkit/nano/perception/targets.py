"""Dense targets for training encoders from random weights: what covers each cell of a view.

The released SPHINX starts from encoders that others have trained on hundreds of millions of pictures. No such encoders
exist for 64 pixels, so SPHINX-nano's are trained first, by dense supervision.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from sphinxkit.formatters.tasks import COCO_KEYPOINTS
from sphinxkit.nano.world.font import ADVANCE, GLYPH_HEIGHT, GLYPHS, glyph, text_mask
from sphinxkit.nano.world.page_blocks import TITLE_GAP
from sphinxkit.nano.world.palette import COLORS
from sphinxkit.nano.world.scene import Rect, Scene
from sphinxkit.nano.world.shapes import SHAPES

CELLS = 8
"""Cells along a side of a view."""

MARKS = 16
"""Marks along a side, two by two in a cell; the target of a mark is the character that covers it."""

BINS = 64
"""Steps along a side that a box's edges are rounded to; there is one class more than steps."""

THINGS = (*SHAPES, "person", "word", "bar", "text", "title", "list", "table", "figure")
NO_THING = len(THINGS)
NO_COLOR = len(COLORS)
CHARACTERS = "".join(GLYPHS)
NO_CHARACTER = len(CHARACTERS)
KINDS = ("single", "shapes", "texts", "poster", "people", "mixed", "page", "chart")
MAX_COUNT = 7  # of shapes, people, words, blocks and bars, each; more counts as this many
MIN_VISIBLE = 0.3  # of a thing's area that a view must hold; our choice

_COLOR_INDEX = {name: index for index, name in enumerate(COLORS)}
_THING_INDEX = {name: index for index, name in enumerate(THINGS)}
_POINT_INDEX = {name: index for index, name in enumerate(COCO_KEYPOINTS)}


@dataclass(frozen=True, slots=True)
class Targets:
    """The targets of one view.

    Args:
        thing: Index in ``THINGS`` of what covers each cell, or ``NO_THING``.
        color: Index of its colour in ``COLORS``, or ``NO_COLOR``.
        box: Its edges (x1, y1, x2, y2) in ``BINS`` steps of the view's side.
        points: A person's key points (x, y) in units of the view's side.
        point_seen: Whether each key point is drawn and inside the view.
        characters: Index in ``CHARACTERS`` of what covers each mark, or ``NO_CHARACTER``.
        counts: Kind of the scene, then how many shapes, people, words, blocks and bars there are.
        pairs: 1 for each pair of colour and shape that is there.
    Shape:
        thing, color: (64,) int64
        box: (64, 4) int64
        points: (64, 17, 2) float32
        point_seen: (64, 17) bool
        characters: (256,) int64
        counts: (6,) int64
        pairs: (64,) float32
    """

    thing: NDArray[np.int64]
    color: NDArray[np.int64]
    box: NDArray[np.int64]
    points: NDArray[np.float32]
    point_seen: NDArray[np.bool_]
    characters: NDArray[np.int64]
    counts: NDArray[np.int64]
    pairs: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class View:
    """The square of a scene's picture that an encoder is shown.

    Args:
        left: Its first column, in the picture's pixels.
        top: Its first row.
        side: Its side.
    """

    left: int
    top: int
    side: int

    def edges(self, rect: Rect) -> NDArray[np.float64]:
        """(x1, y1, x2, y2) of a rectangle in units of the view's side, not clipped."""
        start = np.array([self.left, self.top, self.left, self.top], dtype=np.float64)
        return (np.array(rect, dtype=np.float64) - start) / self.side


@cache
def _lead(character: str) -> int:
    """Empty columns in front of a character's ink."""
    return int(np.flatnonzero(glyph(character).any(axis=0))[0])


def _things(scene: Scene) -> list[tuple[str, str | None, Rect, dict[str, tuple[int, int]]]]:
    found: list[tuple[str, str | None, Rect, dict[str, tuple[int, int]]]] = [
        (shape.shape, shape.color, shape.rect, {}) for shape in scene.shapes
    ]
    found += [("person", person.color, person.rect, person.pixels) for person in scene.people]
    found += [("word", word.panel[1] if word.panel else None, word.rect, {}) for word in scene.words]
    found += [(block.kind, None, block.rect, {}) for block in scene.blocks]
    if scene.chart is not None:
        found += [("bar", bar.color, bar.rect, {}) for bar in scene.chart.bars]
    return found


def _texts(scene: Scene) -> list[tuple[str, int, int, int]]:
    """Every text in the picture: its letters, left and top edge of its ink, pixels per pixel of the font."""
    found = [(word.text, word.rect.x1, word.rect.y1, word.scale) for word in scene.words]
    for block in scene.blocks:
        left = block.rect.x1
        for text in block.text:
            found.append((text, left, block.rect.y1, block.scale))
            left += text_mask(text, block.scale).shape[1] + TITLE_GAP * block.scale
    if scene.chart is not None:
        for bar in scene.chart.bars:
            found.append((bar.label, *bar.label_at, scene.chart.scale))
            found.append((str(bar.value), *bar.value_at, scene.chart.scale))
    return found


def _covered(start: float, end: float, count: int) -> slice:
    """The cells, of ``count`` along a side, whose middles lie between two edges; at least the one in the middle."""
    first, last = int(np.ceil(start * count - 0.5)), int(np.ceil(end * count - 0.5))
    if last <= first:
        first = min(count - 1, int((start + end) / 2 * count))
        last = first + 1
    return slice(max(0, first), min(count, last))


def make_targets(scene: Scene, view: View) -> Targets:
    """The targets of a view of a scene.

    Args:
        scene: What is drawn.
        view: The part of the picture that is seen.
    """
    thing = np.full((CELLS, CELLS), NO_THING, dtype=np.int64)
    color = np.full((CELLS, CELLS), NO_COLOR, dtype=np.int64)
    box = np.zeros((CELLS, CELLS, 4), dtype=np.int64)
    points = np.zeros((CELLS, CELLS, len(COCO_KEYPOINTS), 2), dtype=np.float32)
    seen = np.zeros((CELLS, CELLS, len(COCO_KEYPOINTS)), dtype=np.bool_)
    pairs = np.zeros((len(COLORS), len(SHAPES)), dtype=np.float32)
    tally = dict.fromkeys(("shape", "person", "word", "block", "bar"), 0)
    # the smaller thing covers the larger one
    for name, hue, rect, joints in sorted(_things(scene), key=lambda item: -item[2].width * item[2].height):
        edges = view.edges(rect)
        inside = edges.clip(0.0, 1.0)
        area = (inside[2] - inside[0]) * (inside[3] - inside[1])
        if area < MIN_VISIBLE * (edges[2] - edges[0]) * (edges[3] - edges[1]):
            continue
        cells = _covered(inside[1], inside[3], CELLS), _covered(inside[0], inside[2], CELLS)
        thing[cells] = _THING_INDEX[name]
        color[cells] = NO_COLOR if hue is None else _COLOR_INDEX[hue]
        box[cells] = np.rint(inside * BINS).astype(np.int64)
        points[cells], seen[cells] = 0.0, False
        for joint, (x, y) in joints.items():
            place = (x + 0.5 - view.left) / view.side, (y + 0.5 - view.top) / view.side
            points[(*cells, _POINT_INDEX[joint])] = place
            seen[(*cells, _POINT_INDEX[joint])] = min(place) >= 0.0 and max(place) <= 1.0
        if name in SHAPES and hue is not None:
            pairs[_COLOR_INDEX[hue], SHAPES.index(name)] = 1.0
        tally["shape" if name in SHAPES else name if name in tally else "block"] += 1
    counts = [KINDS.index(scene.kind), *(min(MAX_COUNT, count) for count in tally.values())]
    return Targets(
        thing.reshape(-1),
        color.reshape(-1),
        box.reshape(-1, 4),
        points.reshape(-1, len(COCO_KEYPOINTS), 2),
        seen.reshape(-1, len(COCO_KEYPOINTS)),
        _characters(scene, view),
        np.array(counts, dtype=np.int64),
        pairs.reshape(-1),
    )


def _characters(scene: Scene, view: View) -> NDArray[np.int64]:
    found = np.full((MARKS, MARKS), NO_CHARACTER, dtype=np.int64)
    for text, left, top, scale in _texts(scene):
        x = left - _lead(text[0]) * scale
        for index, character in enumerate(text):
            start = x + index * ADVANCE * scale
            edges = view.edges(Rect(start, top, start + ADVANCE * scale, top + GLYPH_HEIGHT * scale))
            middle = (edges[:2] + edges[2:]) / 2
            if middle.min() > 0.0 and middle.max() < 1.0:
                inside = edges.clip(0.0, 1.0)
                cells = _covered(inside[1], inside[3], MARKS), _covered(inside[0], inside[2], MARKS)
                found[cells] = CHARACTERS.index(character)
    return found.reshape(-1)
