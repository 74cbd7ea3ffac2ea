"""Coordinates in answers: written as fractions of the padded square with three decimals, parsed tolerantly to pixels.

Source: SPHINX, arXiv:2311.07575, section 3.3 (coordinates as plain numbers); three decimals as in the authors' answers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from sphinxkit.errors import DataError
from sphinxkit.formatters.tasks.base import ErrorLog
from sphinxkit.geometry import Box, ImageGeometry, Point

DECIMALS = 3
ROUNDING = 0.5 * 10.0**-DECIMALS
"""Largest error of a written coordinate, in units of the padded square's side."""

ANNOTATION_SLACK = 1.0
"""Pixels by which a sample's box or point may leave the image; it is clipped (our choice: COCO and RefCOCO boxes do so
by fractions of a pixel)."""

VALUE_SLACK = 0.1
"""How far outside [0, 1] a coordinate, or outside the image a point, may be, in units of the side, and is still moved
to the edge; beyond it is a failure (our choice)."""

MAX_NUMBER_LENGTH = 32
"""Longest number, in characters, that is read (our choice)."""

_FLOAT_NOISE = 1e-9  # of the side: what going to the square and back loses in float64, with room
_SPACES = re.compile(r"\s+")
_GROUP_SPACES = re.compile(r"[,\s]+")
_IN_UNIT = rf"(?:0?\.[0-9]{{1,{MAX_NUMBER_LENGTH - 2}}}|[01](?:\.0{{0,{MAX_NUMBER_LENGTH - 2}}})?)"
_PERFECT = re.compile(rf"{_IN_UNIT}(?:,{_IN_UNIT})*+")  # numbers in [0, 1] and commas alone
NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


def _write(numbers: Sequence[float]) -> str:
    return ",".join(f"{number:.{DECIMALS}f}" for number in numbers)


def check_point(task: str, point: Point, geometry: ImageGeometry) -> Point:
    """The point inside the image, clipped if it is out by at most ``ANNOTATION_SLACK`` pixels.

    Raises:
        DataError: It is farther out, or not finite.
    """
    clipped = geometry.clip_point(point)
    # written so that a NaN fails
    if not (abs(clipped.x - point.x) <= ANNOTATION_SLACK and abs(clipped.y - point.y) <= ANNOTATION_SLACK):
        raise DataError(f"task {task!r}: {point} lies outside the image of {geometry.width}x{geometry.height}")
    return clipped


def check_box(task: str, box: Box, geometry: ImageGeometry) -> Box:
    """The box inside the image, clipped if it is out by at most ``ANNOTATION_SLACK`` pixels.

    Raises:
        DataError: It is farther out, not finite, or no ``Box``.
    """
    if not isinstance(box, Box):
        raise DataError(f"task {task!r}: a box is a geometry.Box(x1, y1, x2, y2), got {box!r:.60}")
    start = check_point(task, Point(box.x1, box.y1), geometry)
    end = check_point(task, Point(box.x2, box.y2), geometry)
    return Box(start.x, start.y, end.x, end.y)


def write_boxes(task: str, boxes: Sequence[Box], geometry: ImageGeometry) -> str:
    """Boxes in pixels -> ``[x1,y1,x2,y2;...]``.

    Raises:
        DataError: As ``check_box``.
    """
    square = [geometry.box_to_square(check_box(task, box, geometry)) for box in boxes]
    return "[" + ";".join(_write((box.x1, box.y1, box.x2, box.y2)) for box in square) + "]"


def write_point(task: str, point: Point, geometry: ImageGeometry) -> str:
    """A point in pixels -> ``[x,y]``.

    Raises:
        DataError: As ``check_point``.
    """
    square = geometry.point_to_square(check_point(task, point, geometry))
    return f"[{_write((square.x, square.y))}]"


def read_numbers(log: ErrorLog, start: int, end: int, arity: int) -> list[tuple[tuple[float, ...], int, int]]:
    """Read the inside of a bracket, ``text[start:end]``, as groups of ``arity`` numbers in [0, 1].

    Repairs: spaces, commas for semicolons and the other way round, doubled or trailing separators, values a little out
    of [0, 1]. A group with a word, a value far out or a wrong number of numbers is a failure and left out.

    Returns:
        For each group its numbers and its place in the text.
    """
    groups: list[tuple[tuple[float, ...], int, int]] = []
    text = log.text
    position = start
    inside = text[start:end]
    if not inside.strip():
        return groups
    parts = inside.split(";")
    if 1 < len(parts) <= arity == sum(len(part.split(",")) for part in parts):  # "0.1,0.2;0.3,0.4" for one box
        log.add("separator", start, end, is_repaired=True)
        parts = [inside.replace(";", ",")]
    for part in parts:
        if log.is_full:
            break
        stop = position + len(part)
        numbers = _read_group(log, part, position, stop)
        if numbers is not None:
            if len(numbers) == arity:
                groups.append((tuple(numbers), position, stop))
            elif numbers and len(numbers) % arity == 0:
                log.add("separator", position, stop, is_repaired=True)
                groups += [(tuple(numbers[i : i + arity]), position, stop) for i in range(0, len(numbers), arity)]
            else:
                log.add("wrong_count", position, stop, is_repaired=False)
        position = stop + 1
    return groups


def _read_group(log: ErrorLog, part: str, start: int, stop: int) -> list[float] | None:
    if _PERFECT.fullmatch(part):
        return [float(word) for word in part.split(",")]
    return _repair_group(log, part, start, stop)


def _is_odd(word: str) -> bool:
    return len(word) > MAX_NUMBER_LENGTH or NUMBER.fullmatch(word) is None


def _repair_group(log: ErrorLog, part: str, start: int, stop: int) -> list[float] | None:
    if not part.strip():
        log.add("separator", start, stop, is_repaired=True)
        return None
    words = [word for word in _GROUP_SPACES.split(part) if word]
    commas = part.count(",")
    if commas != len(words) - 1:
        log.add("separator", start, stop, is_repaired=True)
    if _SPACES.search(part):
        log.add("spaces", start, stop, is_repaired=True)
    if not words or any(map(_is_odd, words)):
        log.add("not_a_number", start, stop, is_repaired=False)
        return None
    numbers = [float(word) for word in words]
    if not all(-VALUE_SLACK <= number <= 1.0 + VALUE_SLACK for number in numbers):
        log.add("out_of_range", start, stop, is_repaired=False)
        return None
    clipped = [min(max(number, 0.0), 1.0) for number in numbers]
    if clipped != numbers:
        log.add("clipped_value", start, stop, is_repaired=True)
    return clipped


def _clip(low: float, high: float, offset: int, side: int, size: int) -> tuple[float, float, float]:
    """Square interval -> its pixels inside [0, size], and by how many pixels more than rounding it reached out.

    Infinitely many where no part of it was inside.
    """
    start, end = low * side - offset, high * side - offset
    room = (ROUNDING + _FLOAT_NOISE) * side
    inside_start, inside_end = min(max(start, 0.0), float(size)), min(max(end, 0.0), float(size))
    out = max(inside_start - start, end - inside_end) - room
    return inside_start, inside_end, math.inf if end < -room or start > size + room else out


def is_empty(text: str) -> bool:
    """Whether the inside of a bracket has nothing but spaces and separators."""
    return not text.replace(";", " ").strip()


def read_boxes(log: ErrorLog, start: int, end: int, geometry: ImageGeometry) -> tuple[Box, ...]:
    """Read the inside of a bracket as boxes, in pixels of the original image and inside it."""
    side, (left, top) = geometry.side, geometry.offset
    right, bottom = geometry.width + left, geometry.height + top
    boxes = []
    for (x1, y1, x2, y2), begin, stop in read_numbers(log, start, end, 4):
        if left <= x1 * side <= x2 * side <= right and top <= y1 * side <= y2 * side <= bottom:
            boxes.append(Box(x1 * side - left, y1 * side - top, x2 * side - left, y2 * side - top))
            continue
        if x1 > x2 or y1 > y2:
            log.add("swapped_corners", begin, stop, is_repaired=True)
            x1, x2 = min(x1, x2), max(x1, x2)
            y1, y2 = min(y1, y2), max(y1, y2)
        px1, px2, out_x = _clip(x1, x2, left, side, geometry.width)
        py1, py2, out_y = _clip(y1, y2, top, side, geometry.height)
        out = max(out_x, out_y)
        if out == math.inf:
            log.add("outside_image", begin, stop, is_repaired=False)
            continue
        if out > 0.0:
            log.add("clipped", begin, stop, is_repaired=True)
        boxes.append(Box(px1, py1, px2, py2))
    return tuple(boxes)


def read_points(log: ErrorLog, start: int, end: int, geometry: ImageGeometry) -> tuple[Point, ...]:
    """Read the inside of a bracket as points, in pixels of the original image and inside it."""
    side, (left, top) = geometry.side, geometry.offset
    points = []
    for (x, y), begin, stop in read_numbers(log, start, end, 2):
        px, py = x * side - left, y * side - top
        inside = geometry.clip_point(Point(px, py))
        out = max(abs(inside.x - px), abs(inside.y - py)) / side
        if out > VALUE_SLACK:
            log.add("outside_image", begin, stop, is_repaired=False)
            continue
        if out > ROUNDING + _FLOAT_NOISE:
            log.add("clipped", begin, stop, is_repaired=True)
        points.append(inside)
    return tuple(points)
