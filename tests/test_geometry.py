from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sphinxkit.errors import DataError
from sphinxkit.geometry import Box, ImageGeometry, Point, read_box

# One rounding per operation: a sum, a division and their inverses, each relative to the side or the result.
ULPS = 4 * 2.0**-52

sides = st.integers(1, 50_000)
fractions = st.floats(0, 1)


@pytest.mark.parametrize(
    ("size", "side", "offset"),
    [((640, 427), 640, (0, 106)), ((300, 500), 500, (100, 0)), ((420, 420), 420, (0, 0)), ((1, 4), 4, (1, 0))],
)
def test_side_and_offset_by_hand(size, side, offset) -> None:
    geometry = ImageGeometry(*size)
    assert (geometry.side, geometry.offset) == (side, offset)


def test_boxes_by_hand() -> None:
    wide = ImageGeometry(200, 100)
    assert wide.box_to_square(Box(0, 0, 200, 100)) == Box(0.0, 0.25, 1.0, 0.75)
    assert wide.box_to_square(Box(50, 20, 100, 60)) == Box(0.25, 0.35, 0.5, 0.55)
    assert wide.point_to_pixels(Point(1.0, 0.0)) == Point(200, -50)
    odd = ImageGeometry(3, 8)  # padded by 2 at the left and 3 at the right
    assert odd.point_to_square(Point(0, 0)) == Point(0.25, 0.0)
    assert odd.point_to_square(Point(3, 8)) == Point(0.625, 1.0)
    assert odd.clip_point(Point(7.5, -1)) == Point(3.0, 0.0)


@given(sides, sides)
def test_offset_is_that_of_the_public_padding(width: int, height: int) -> None:
    geometry = ImageGeometry(width, height)
    missing = abs(width - height) // 2
    assert geometry.offset == ((missing, 0) if height > width else (0, missing))


@given(sides, sides, fractions, fractions)
def test_pixels_to_square_and_back(width: int, height: int, x: float, y: float) -> None:
    geometry = ImageGeometry(width, height)
    point = Point(x * width, y * height)
    square = geometry.point_to_square(point)
    assert -ULPS <= square.x <= 1 + ULPS
    assert -ULPS <= square.y <= 1 + ULPS
    back = geometry.point_to_pixels(square)
    assert math.isclose(back.x, point.x, rel_tol=0, abs_tol=ULPS * geometry.side)
    assert math.isclose(back.y, point.y, rel_tol=0, abs_tol=ULPS * geometry.side)


@given(sides, sides, st.tuples(fractions, fractions, fractions, fractions))
def test_square_to_pixels_and_back(width: int, height: int, corners: tuple[float, float, float, float]) -> None:
    geometry = ImageGeometry(width, height)
    (x1, x2), (y1, y2) = sorted(corners[::2]), sorted(corners[1::2])
    box = Box(x1, y1, x2, y2)
    start, end = (geometry.point_to_pixels(Point(*corner)) for corner in ((x1, y1), (x2, y2)))
    back = geometry.box_to_square(Box(*(start.x, start.y), *(end.x, end.y)))
    for got, expected in zip((back.x1, back.y1, back.x2, back.y2), (box.x1, box.y1, box.x2, box.y2), strict=True):
        assert math.isclose(got, expected, rel_tol=0, abs_tol=ULPS)


def test_area_and_iou() -> None:
    assert Box(0, 0, 2, 3).area == 6
    assert Box(2, 0, 2, 3).area == 0
    assert Box(0, 0, 2, 2).iou(Box(1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert Box(0, 0, 2, 2).iou(Box(5, 5, 6, 6)) == 0
    assert Box(0, 0, 0, 0).iou(Box(0, 0, 0, 0)) == 0
    assert Box(1, 2, 3, 4).iou(Box(1, 2, 3, 4)) == 1


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (math.nan, 5), (5, math.inf)])
def test_empty_images_are_refused(size) -> None:
    with pytest.raises(DataError, match=f"sides must be positive, got {size[0]}x{size[1]}"):
        ImageGeometry(*size)


@pytest.mark.parametrize("corners", [(10, 10, 5, 5), (0, 3, 2, 1), (2, 0, 0, 3), (0, 0, math.nan, 1)])
def test_swapped_corners_are_refused(corners: tuple[float, ...]) -> None:
    with pytest.raises(DataError, match=r"expected x1 <= x2 and y1 <= y2, the top left corner first"):
        Box(*corners)


def test_boxes_as_text() -> None:
    assert read_box("1, 2.5,3,4") == Box(1.0, 2.5, 3.0, 4.0)
    for text in ("", "1,2,3", "1,2,3,x", "1;2;3;4"):
        with pytest.raises(DataError, match=rf"region '{text}': expected X1,Y1,X2,Y2 in pixels"):
            read_box(text)
    with pytest.raises(DataError, match=r"region '3,2,1,4': box .* its corners are swapped"):
        read_box("3,2,1,4")
