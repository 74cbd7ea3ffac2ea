from __future__ import annotations

import numpy as np
import pytest

from sphinxkit.errors import DataError
from sphinxkit.nano.world.shapes import SHAPES, shape_mask

# A drawn area may differ from the true one by about half the outline's pixels; outlines are at most 6 sides long.
AREA_SLACK = 3.0
TRUE_AREAS = {  # of the unit square
    "circle": np.pi / 4,
    "square": 1.0,
    "triangle": 0.5,
    "diamond": 0.5,
    "cross": 1 - 4 * 0.34**2,
    "ring": np.pi / 4 * (1 - (11 / 20) ** 2),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", [5, 6, 14, 15, 40, 113])
def test_masks_are_cropped_and_of_their_size(shape: str, side: int) -> None:
    mask = shape_mask(shape, side)
    height, width = mask.shape
    assert side - 2 <= height <= side
    assert side - 2 <= width <= side
    assert mask[0].any()
    assert mask[-1].any()
    assert mask[:, 0].any()
    assert mask[:, -1].any()


@pytest.mark.parametrize(("shape", "area"), TRUE_AREAS.items())
def test_areas(shape: str, area: float) -> None:
    for side in (20, 41, 100):
        assert abs(shape_mask(shape, side).sum() - area * side * side) <= AREA_SLACK * side


@pytest.mark.parametrize("shape", SHAPES)
def test_mirror_images(shape: str) -> None:
    mask = shape_mask(shape, 40)
    if shape not in ("star", "heart"):  # whose slanted sides cross pixel centres on one side only
        assert np.array_equal(mask, mask[:, ::-1])
    assert (mask != mask[:, ::-1]).sum() <= 40


def test_shapes_differ() -> None:
    masks = {np.packbits(np.resize(shape_mask(shape, 14), (14, 14))).tobytes() for shape in SHAPES}
    assert len(masks) == len(SHAPES)


def test_a_diamond_by_hand() -> None:
    rows = ["".join(".#"[pixel] for pixel in row) for row in shape_mask("diamond", 7).astype(int)]
    assert rows == ["...#...", "..###..", ".#####.", "#######", ".#####.", "..###..", "...#..."]


def test_what_cannot_be_drawn() -> None:
    with pytest.raises(DataError, match="there is no 'blob'"):
        shape_mask("blob", 10)
    with pytest.raises(DataError, match="a side of 4 pixels is too small"):
        shape_mask("circle", 4)
