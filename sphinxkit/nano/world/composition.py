"""Composes random scenes: objects and positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from sphinxkit.errors import DataError
from sphinxkit.nano.world.charts import draw_chart
from sphinxkit.nano.world.figures import MIN_HEIGHT, draw_pose, figure
from sphinxkit.nano.world.font import text_mask
from sphinxkit.nano.world.pages import draw_page
from sphinxkit.nano.world.palette import (
    COLORS,
    DARK,
    LIGHT,
    REAL_JITTER,
    RGB,
    jittered,
    luminance,
    paper_tint,
    real_tint,
    synthetic_tint,
)
from sphinxkit.nano.world.rng import Rng
from sphinxkit.nano.world.scene import Domain, Person, Rect, Scene, Shape, Word, content_key, hash_content
from sphinxkit.nano.world.shapes import SHAPES, shape_mask
from sphinxkit.nano.world.splits import check_split, is_held_out_pair, split_of
from sphinxkit.nano.world.words import draw_word

# Sides of the shapes in thousandths of the picture's short side; apart, so that a size has one name. Our choice.
SIZES: Mapping[str, tuple[int, int]] = {
    "tiny": (60, 80),
    "small": (130, 165),
    "medium": (220, 270),
    "large": (340, 410),
}
MIN_SIDE = 64  # pixels of the picture's short side; below it the font does not fit
GAP = 2  # pixels between things, for each whole 128 of the short side (at least one)
TRIES = 24  # places that are tried for a thing before it is left out
POSTER_WORDS = 16  # that are tried on a poster; what does not fit is left out
COPY_PERCENT = 25  # shapes that repeat an earlier one's colour and shape
HELD_OUT_PERCENT = 50  # of the shapes after the first, in test


@dataclass(frozen=True, slots=True)
class Style:
    """How scenes are made.

    Args:
        width: Width of the picture, in pixels.
        height: Height of the picture, in pixels.
        domain: ``real`` or ``synthetic``.
        split: ``train``, ``val`` or ``test``.
        max_objects: Shapes at most.
        sizes: Names of the sizes that shapes have.
        has_small_text: Set words at half the size.
    Raises:
        DataError: One of them is not possible.
    """

    width: int = 112
    height: int = 112
    domain: Domain = "synthetic"
    split: str = "train"
    max_objects: int = 6
    sizes: tuple[str, ...] = ("small", "medium", "large")
    has_small_text: bool = False

    def __post_init__(self) -> None:
        check_split(self.split)
        if self.domain not in ("real", "synthetic"):
            raise DataError(f"world: domain {self.domain!r}, expected real or synthetic")
        if min(self.width, self.height) < MIN_SIDE:
            raise DataError(f"world: {self.width} x {self.height} pixels, expected at least {MIN_SIDE} each")
        if self.max_objects < 1:
            raise DataError(f"world: max_objects must be at least 1, got {self.max_objects}")
        unknown = [size for size in self.sizes if size not in SIZES]
        if unknown or not self.sizes:
            raise DataError(f"world: sizes {list(self.sizes)}, expected some of {', '.join(SIZES)}")

    @property
    def short_side(self) -> int:
        """The shorter side, in pixels."""
        return min(self.width, self.height)

    @property
    def gap(self) -> int:
        """Pixels between things and to the edges."""
        return GAP * max(1, self.short_side // 128)

    @property
    def text_scale(self) -> int:
        """Pixels per pixel of the font: an eighth of the short side is a line of text (a sixteenth for small text)."""
        return max(1, self.short_side // (112 if self.has_small_text else 56))

    @property
    def is_held_out(self) -> bool:
        """Whether scenes are made of what training never sees."""
        return self.split == "test"

    @property
    def jitter(self) -> int:
        """Largest change of a colour's channel."""
        return REAL_JITTER if self.domain == "real" else 0


class _Room:
    """The free part of a picture."""

    def __init__(self, style: Style) -> None:
        self._style = style
        self._taken: list[Rect] = []

    def place(self, rng: Rng, width: int, height: int) -> Rect | None:
        """A free rectangle of that size, or None if none was found."""
        gap = self._style.gap
        right, bottom = self._style.width - gap - width, self._style.height - gap - height
        if right < gap or bottom < gap:
            return None
        for _ in range(TRIES):
            x, y = rng.between(gap, right), rng.between(gap, bottom)
            if all(
                x >= r.x2 + gap or y >= r.y2 + gap or x + width + gap <= r.x1 or y + height + gap <= r.y1
                for r in self._taken
            ):
                rect = Rect(x, y, x + width, y + height)
                self._taken.append(rect)
                return rect
        return None


def draw_pair(rng: Rng, held_out: bool) -> tuple[str, str]:
    """A colour and a shape that training shows together, or that it never does."""
    names = tuple(COLORS)
    while True:
        color, shape = rng.choice(names), rng.choice(SHAPES)
        if is_held_out_pair(color, shape) == held_out:
            return color, shape


def _shapes(rng: Rng, style: Style, room: _Room, count: int, sizes: Sequence[str]) -> tuple[Shape, ...]:
    found: list[Shape] = []
    for index in range(count):
        held_out = style.is_held_out and (not found or rng.chance(HELD_OUT_PERCENT))
        if index > 1 and len(found) > 1 and rng.chance(COPY_PERCENT):
            model = rng.choice(found[1:])
            color, shape = model.color, model.shape
        else:
            color, shape = draw_pair(rng, held_out)
        size = rng.choice(sizes)
        low, high = SIZES[size]
        side = max(5, rng.between(low * style.short_side // 1000, high * style.short_side // 1000))
        height, width = shape_mask(shape, side).shape
        rect = room.place(rng, width, height)
        if rect is not None:
            found.append(Shape(shape, color, size, side, rect, jittered(COLORS[color], rng, style.jitter)))
    return tuple(found)


def _words(rng: Rng, style: Style, room: _Room, count: int) -> tuple[Word, ...]:
    found: list[Word] = []
    for _ in range(count):
        text = draw_word(rng, style.is_held_out)
        base = style.text_scale
        scale = rng.between(base, base + (base + 1) // 2)
        height, width = text_mask(text, scale).shape
        while scale > 1 and width + 4 * scale + 2 * style.gap > style.width:
            scale -= 1
            height, width = text_mask(text, scale).shape
        padding = 2 * scale
        outer = room.place(rng, width + 2 * padding, height + 2 * padding)
        if outer is None or any(word.text == text for word in found):
            continue
        rect = Rect(outer.x1 + padding, outer.y1 + padding, outer.x2 - padding, outer.y2 - padding)
        panel: tuple[Rect, str, RGB] | None = None
        ink = DARK
        if rng.chance(50):
            color = rng.choice(tuple(COLORS))
            panel = (outer, color, jittered(COLORS[color], rng, style.jitter))
            ink = DARK if luminance(panel[2]) > 120 else LIGHT
        found.append(Word(text, scale, rect, ink, panel))
    return tuple(sorted(found, key=lambda word: (word.rect.y1, word.rect.x1)))


def _people(rng: Rng, style: Style, room: _Room, count: int) -> tuple[Person, ...]:
    found: list[Person] = []
    tallest = (800, 620, 520)[min(count, 3) - 1]
    for _ in range(count):
        pose = draw_pose(rng, style.is_held_out)
        color = rng.choice(tuple(COLORS))
        height = max(MIN_HEIGHT, rng.between(tallest * 7 // 10, tallest) * style.short_side // 1000)
        rows, columns = figure(pose, height).labels.shape
        rect = room.place(rng, columns, rows)
        if rect is not None:
            found.append(Person(pose, height, color, rect, jittered(COLORS[color], rng, style.jitter)))
    return tuple(sorted(found, key=lambda person: person.rect))


def _single(rng: Rng, style: Style, scene: Scene) -> Scene:
    sizes = style.sizes[-2:]
    return replace(scene, shapes=_shapes(rng, style, _Room(style), 1, sizes))


def _many(rng: Rng, style: Style, scene: Scene) -> Scene:
    count = rng.between(min(2, style.max_objects), style.max_objects)
    return replace(scene, shapes=_shapes(rng, style, _Room(style), count, style.sizes))


def _texts(rng: Rng, style: Style, scene: Scene) -> Scene:
    return replace(scene, words=_words(rng, style, _Room(style), rng.between(1, 3)))


def _poster(rng: Rng, style: Style, scene: Scene) -> Scene:
    return replace(scene, words=_words(rng, style, _Room(style), POSTER_WORDS))


def _crowd(rng: Rng, style: Style, scene: Scene) -> Scene:
    return replace(scene, people=_people(rng, style, _Room(style), rng.weighted(((1, 3), (2, 2), (3, 1)))))


def _mixed(rng: Rng, style: Style, scene: Scene) -> Scene:
    room = _Room(style)
    people = _people(rng, style, room, rng.between(0, 1))
    words = _words(rng, style, room, rng.between(0 if people else 1, 1))
    shapes = _shapes(rng, style, room, rng.between(1, min(3, style.max_objects)), style.sizes)
    return replace(scene, shapes=shapes, words=words, people=people)


def _page(rng: Rng, style: Style, scene: Scene) -> Scene:
    columns = draw_page(rng, style.width, style.height, style.text_scale, style.is_held_out)
    return replace(scene, columns=columns)


def _chart(rng: Rng, style: Style, scene: Scene) -> Scene:
    return replace(scene, chart=draw_chart(rng, style.width, style.height, style.text_scale, style.is_held_out))


KINDS: Mapping[str, Callable[[Rng, Style, Scene], Scene]] = {
    "single": _single,
    "shapes": _many,
    "texts": _texts,
    "people": _crowd,
    "mixed": _mixed,
    "page": _page,
    "chart": _chart,
    "poster": _poster,
}
PAPER_KINDS = ("page", "chart")


def compose(rng: Rng, style: Style, kind: str) -> Scene:
    """Draw a scene of a kind that belongs to the style's split.

    Args:
        rng: Random choices; all of the scene depends on them.
        style: How scenes are made.
        kind: A name of ``KINDS``.
    Raises:
        DataError: The kind is unknown.
    """
    if kind not in KINDS:
        raise DataError(f"world: scene kind {kind!r}, expected one of {', '.join(KINDS)}")
    empty = Scene(style.width, style.height, style.domain, style.split, kind, (0, 0, 0), rng.bits())
    scene = KINDS[kind](rng, style, empty)
    key = content_key(scene)
    scenery = real_tint if style.domain == "real" else synthetic_tint
    choose = paper_tint if kind in PAPER_KINDS else scenery
    while True:
        tint = choose(rng)
        if split_of(hash_content(key, tint)) == style.split:
            return replace(scene, tint=tint)
