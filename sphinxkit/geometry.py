"""Points and boxes, and the maps between original pixels and the padded square of SPHINX's coordinates.

SPHINX pads an image to a square (the image centred, the odd pixel at the bottom or right) and writes coordinates as
fractions of that square's side, at any resolution.
Source: LLaMA2-Accessory, accessory/data/transform.py (padded_resize); SPHINX, arXiv:2311.07575, section 3.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sphinxkit.errors import DataError


@dataclass(frozen=True, slots=True)
class Point:
    """A point (x, y)."""

    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Box:
    """An axis-parallel box by its top left (x1, y1) and bottom right (x2, y2) corners; it may be empty.

    Raises:
        DataError: The corners are swapped, or a coordinate is not a number.
    """

    x1: float
    y1: float
    x2: float
    y2: float

    def __post_init__(self) -> None:
        if not (self.x1 <= self.x2 and self.y1 <= self.y2):  # a NaN fails, too
            raise DataError(
                f"box ({self.x1}, {self.y1}, {self.x2}, {self.y2}): its corners are swapped or not numbers; expected "
                "x1 <= x2 and y1 <= y2, the top left corner first"
            )

    @property
    def area(self) -> float:
        """Width times height."""
        return (self.x2 - self.x1) * (self.y2 - self.y1)

    def iou(self, other: Box) -> float:
        """Intersection over union, in [0, 1]; 0 when both are empty."""
        width = min(self.x2, other.x2) - max(self.x1, other.x1)
        height = min(self.y2, other.y2) - max(self.y1, other.y1)
        intersection = max(0.0, width) * max(0.0, height)
        union = self.area + other.area - intersection
        return intersection / union if union > 0 else 0.0


def read_box(text: str) -> Box:
    """Read ``X1,Y1,X2,Y2``.

    Raises:
        DataError: Not four numbers, or swapped corners.
    """
    try:
        x1, y1, x2, y2 = (float(word) for word in text.split(","))
    except ValueError as error:
        raise DataError(f"region {text!r}: expected X1,Y1,X2,Y2 in pixels") from error
    try:
        return Box(x1, y1, x2, y2)
    except DataError as error:
        raise DataError(f"region {text!r}: {error}") from error


@dataclass(frozen=True, slots=True)
class ImageGeometry:
    """The size of one image, and the maps between its pixels and the padded square.

    Args:
        width: Of the original image, in pixels.
        height: Of the original image, in pixels.
    Raises:
        DataError: A side is not positive and finite.
    """

    width: int
    height: int

    def __post_init__(self) -> None:
        if not (0 < self.width < math.inf and 0 < self.height < math.inf):  # a NaN fails, too
            raise DataError(f"image geometry: sides must be positive, got {self.width}x{self.height}")

    @property
    def side(self) -> int:
        """Side of the padded square, in pixels: the longer side."""
        return max(self.width, self.height)

    @property
    def offset(self) -> tuple[int, int]:
        """(x, y) of the image's top left corner in the square, in pixels: half the difference, rounded down."""
        return (self.side - self.width) // 2, (self.side - self.height) // 2

    def point_to_square(self, point: Point) -> Point:
        """Original pixels -> fractions of the square."""
        x, y = self.offset
        return Point((point.x + x) / self.side, (point.y + y) / self.side)

    def point_to_pixels(self, point: Point) -> Point:
        """Fractions of the square -> original pixels (negative or too large in the padding)."""
        x, y = self.offset
        return Point(point.x * self.side - x, point.y * self.side - y)

    def box_to_square(self, box: Box) -> Box:
        """Original pixels -> fractions of the square."""
        start, end = self.point_to_square(Point(box.x1, box.y1)), self.point_to_square(Point(box.x2, box.y2))
        return Box(start.x, start.y, end.x, end.y)

    def clip_point(self, point: Point) -> Point:
        """The nearest point of the image, in original pixels."""
        return Point(min(max(point.x, 0.0), float(self.width)), min(max(point.y, 0.0), float(self.height)))
