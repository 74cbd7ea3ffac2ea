"""Contents of a scene: shapes, words, people, page blocks, chart bars."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from sphinxkit.data.permutation import derive_key, splitmix64
from sphinxkit.formatters.tasks import Keypoints
from sphinxkit.geometry import Box, ImageGeometry, Point
from sphinxkit.nano.world.figures import Figure, Pose, figure
from sphinxkit.nano.world.palette import RGB

Domain = Literal["real", "synthetic"]


class Rect(NamedTuple):
    """Pixels x1 to x2 - 1 and y1 to y2 - 1."""

    x1: int
    y1: int
    x2: int
    y2: int

    @property
    def box(self) -> Box:
        """The same as edges in pixels."""
        return Box(float(self.x1), float(self.y1), float(self.x2), float(self.y2))

    @property
    def width(self) -> int:
        """Columns."""
        return self.x2 - self.x1

    @property
    def height(self) -> int:
        """Rows."""
        return self.y2 - self.y1

    @property
    def twice_centre(self) -> tuple[int, int]:
        """(x, y) of the middle, times two."""
        return self.x1 + self.x2, self.y1 + self.y2


@dataclass(frozen=True, slots=True)
class Shape:
    """One coloured shape.

    Args:
        shape: Name of the shape.
        color: Name of the colour.
        size: Name of its size.
        side: Side of the square that it is drawn in, in pixels.
        rect: Its pixels' extent.
        rgb: The colour that it is painted in.
    """

    shape: str
    color: str
    size: str
    side: int
    rect: Rect
    rgb: RGB


@dataclass(frozen=True, slots=True)
class Word:
    """One word or numeral.

    Args:
        text: Its letters.
        scale: Pixels per pixel of the font.
        rect: The ink's extent.
        rgb: The ink's colour.
        panel: The sign that it stands on: its extent, the name of its colour and the colour; or None.
    """

    text: str
    scale: int
    rect: Rect
    rgb: RGB
    panel: tuple[Rect, str, RGB] | None


@dataclass(frozen=True, slots=True)
class Person:
    """One stick figure.

    Args:
        pose: How it stands.
        height: Height in pixels when it stands straight.
        color: Name of its clothes' colour.
        rect: Its pixels' extent.
        rgb: The clothes' colour.
    """

    pose: Pose
    height: int
    color: str
    rect: Rect
    rgb: RGB

    @property
    def figure(self) -> Figure:
        """The drawn pose."""
        return figure(self.pose, self.height)

    @property
    def pixels(self) -> dict[str, tuple[int, int]]:
        """Key points by COCO's names: the image's pixel (x, y) in the middle of each joint."""
        return {name: (x + self.rect.x1, y + self.rect.y1) for name, (x, y) in self.figure.points.items()}

    @property
    def keypoints(self) -> Keypoints:
        """Key points by COCO's names: the middles of those pixels."""
        return Keypoints({name: Point(x + 0.5, y + 0.5) for name, (x, y) in self.pixels.items()})

    @property
    def raised(self) -> tuple[str, ...]:
        """The person's own sides whose arm is raised."""
        return tuple(side for side in ("left", "right") if self.figure.is_raised(side))


@dataclass(frozen=True, slots=True)
class Block:
    """One block of a page.

    Args:
        kind: PubLayNet's class.
        rect: Its pixels' extent.
        text: A title's words.
        scale: Pixels per pixel of the font, of a title.
        noise_seed: Seed of what is drawn inside, of all other kinds.
    """

    kind: str
    rect: Rect
    text: tuple[str, ...] = ()
    scale: int = 1
    noise_seed: int = 0


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a chart.

    Args:
        label: Its name.
        value: What it stands for.
        color: Name of its colour.
        rect: Its pixels' extent.
        label_at: Top left corner of the label's ink.
        value_at: Top left corner of the value's ink.
    """

    label: str
    value: int
    color: str
    rect: Rect
    label_at: tuple[int, int]
    value_at: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Chart:
    """A bar chart.

    Args:
        is_horizontal: Whether the bars grow to the right, not upwards.
        scale: Pixels per pixel of the font.
        bars: The bars, from the top or from the left.
        axis: The line that the bars stand on.
    """

    is_horizontal: bool
    scale: int
    bars: tuple[Bar, ...]
    axis: Rect


@dataclass(frozen=True, slots=True)
class Scene:
    """One scene: everything that can be asked about it. ``render.render`` draws its picture.

    Args:
        width: Width of the picture, in pixels.
        height: Height of the picture, in pixels.
        domain: ``real`` or ``synthetic``.
        split: ``train``, ``val`` or ``test``.
        kind: Kind of the scene: a name of ``composition.KINDS``.
        tint: Colour behind everything.
        noise_seed: Seed of texture and noise.
        shapes: The first is the one that is asked about in ``test``.
        words: Words in reading order.
        people: People from left to right.
        columns: A page's blocks, column by column.
        chart: The chart, or None.
    """

    width: int
    height: int
    domain: Domain
    split: str
    kind: str
    tint: RGB
    noise_seed: int
    shapes: tuple[Shape, ...] = ()
    words: tuple[Word, ...] = ()
    people: tuple[Person, ...] = ()
    columns: tuple[tuple[Block, ...], ...] = ()
    chart: Chart | None = None

    @property
    def geometry(self) -> ImageGeometry:
        """The picture's size."""
        return ImageGeometry(self.width, self.height)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """A page's blocks, in reading order."""
        return tuple(block for column in self.columns for block in column)

    @property
    def content_hash(self) -> int:
        """64 bits of what is to be seen, the background's tint included, texture and noise not."""
        return hash_content(content_key(self), self.tint)


def content_key(scene: Scene) -> int:
    """64 bits of everything in a scene but tint, texture and noise; domain and split do not count either."""
    return derive_key(
        (scene.width, scene.height),
        tuple((x.shape, x.color, x.rect) for x in scene.shapes),
        tuple((x.text, x.rect, x.panel and x.panel[1]) for x in scene.words),
        tuple((x.pose.limbs, x.pose.facing, x.color, x.rect) for x in scene.people),
        tuple((x.kind, x.rect, x.text) for x in scene.blocks),
        scene.chart and tuple((x.label, x.value, x.color, x.rect) for x in scene.chart.bars),
    )


def hash_content(key: int, tint: RGB) -> int:
    """``content_key`` and the tint as one hash."""
    return splitmix64(key ^ (tint[0] << 16 | tint[1] << 8 | tint[2]))
