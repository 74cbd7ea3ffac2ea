from __future__ import annotations

import pytest

from sphinxkit.errors import DataError
from sphinxkit.formatters import tasks
from sphinxkit.geometry import Box
from tests.formatters.tasks.faults import GOOD, SQUARE, WIDE, faults


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("[0.1, 0.2, 0.3, 0.4]", ["spaces"]),
        ("[0.1 0.2 0.3 0.4]", ["separator", "spaces"]),
        ("[0.1,0.2;0.3,0.4]", ["separator"]),
        ("[0.1;0.2;0.3;0.4]", ["separator"]),
        ("[0.1,,0.2,0.3,0.4]", ["separator"]),
        ("[0.1,0.2,0.3,0.4;]", ["separator"]),
        ("[0.1,0.2,0.3,0.4", ["missing_close_bracket"]),
        ("0.1,0.2,0.3,0.4]", ["missing_open_bracket"]),
        ("(0.1,0.2,0.3,0.4)", ["missing_open_bracket", "extra_text"]),
        ("[[0.1,0.2,0.3,0.4]]", ["doubled_bracket"]),
        ("[[0.1,0.2,0.3,0.4", ["doubled_bracket", "missing_close_bracket"]),
        ("[0.3,0.4,0.1,0.2]", ["swapped_corners"]),
        ("[0.3,0.2,0.1,0.4]", ["swapped_corners"]),
        ("It is at [0.1,0.2,0.3,0.4]", ["extra_text"]),
        ("<p>man</p>[0.1,0.2,0.3,0.4]", []),
        ("[0.1,0.2,0.3,0.4][0.5,0.5,0.6,0.6]", ["separator", "wrong_count"]),
        ("[0.1,0.2,0.3,0.4] [0.5,0.5,0.6,0.6]", ["separator", "wrong_count"]),
        ("[0.1,0.2,0.3,0.4;0.5,0.5,0.6,0.6]", ["wrong_count"]),
        ("[0.1,0.2,0.3,0.4,0.5,0.5,0.6,0.6]", ["separator", "wrong_count"]),
        ("[0.1,0.2,0.3;0.1,0.2,0.3,0.4]", ["wrong_count!"]),
        ("[1e-1,.2,+0.3,4e-1]", []),
    ],
)
def test_repaired_boxes(text: str, kinds: list[str]) -> None:
    result = tasks.create("rec").parse(text, SQUARE)
    assert result.items == (GOOD,)
    assert faults(result) == kinds
    assert result.is_strict == (not kinds)


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("", ["no_coordinates!"]),
        ("I cannot find it.", ["no_coordinates!"]),
        ("[0.1,0.2,0.3]", ["wrong_count!"]),
        ("[0.1,0.2,0.3,0.4,0.5]", ["wrong_count!"]),
        ("[0.1,0.2,x,0.4]", ["not_a_number!"]),
        ("[0.1,0.2,nan,0.4]", ["not_a_number!"]),
        ("[0.1,0.2,0.3,0." + "4" * 40 + "]", ["not_a_number!"]),
        ("[100,200,300,400]", ["out_of_range!"]),
        ("[0.1,0.2,0.3,1.2]", ["out_of_range!"]),
        ("[0.1,0.2,0.3,1e999]", ["out_of_range!"]),
    ],
)
def test_failed_boxes(text: str, kinds: list[str]) -> None:
    result = tasks.create("rec").parse(text, SQUARE)
    assert result.items == ()
    assert faults(result) == kinds
    assert result.failures == result.errors


def test_a_box_of_another_kind() -> None:
    with pytest.raises(DataError, match=r"task 'reg': a box is a geometry.Box\(x1, y1, x2, y2\), got \[1, 2, 3, 4\]"):
        tasks.create("reg").prompt([1, 2, 3, 4], WIDE)


@pytest.mark.parametrize(
    ("text", "items", "kinds"),
    [
        ("[0.1,0.3,0.3,0.4]", (Box(100.0, 50.0, 300.0, 150.0),), []),
        ("[-0.05,0.3,0.3,0.4]", (Box(0.0, 50.0, 300.0, 150.0),), ["clipped_value"]),
        ("[0.1,0.2,0.3,0.4]", (Box(100.0, 0.0, 300.0, 150.0),), ["clipped"]),
        ("[0.1,0.0,0.3,1.0]", (Box(100.0, 0.0, 300.0, 500.0),), ["clipped"]),
        ("[0.1,0.0,0.3,0.2]", (), ["outside_image!"]),
        ("[0.1,0.8,0.3,0.9]", (), ["outside_image!"]),
    ],
)
def test_boxes_in_the_padding(text: str, items: tuple[Box, ...], kinds: list[str]) -> None:
    result = tasks.create("rec").parse(text, WIDE)
    assert len(result.items) == len(items)
    for found, expected in zip(result.items, items, strict=True):
        assert corners(found) == pytest.approx(corners(expected))
    assert faults(result) == kinds


def corners(box: Box) -> tuple[float, ...]:
    return box.x1, box.y1, box.x2, box.y2
