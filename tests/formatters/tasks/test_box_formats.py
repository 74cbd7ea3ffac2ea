from __future__ import annotations

import pytest

from sphinxkit.errors import DataError
from sphinxkit.formatters.tasks import BOX_FORMATS, GroundedPhrase, read_boxes_of
from sphinxkit.geometry import Box, ImageGeometry

WIDE = ImageGeometry(2000, 500)  # not square: the axes have scales of their own, x 2 and y 0.5 for thousandths
BOX = Box(200, 100, 600, 450)
ANSWERS = {
    "pixels": "[200, 100, 600.0, 450]",
    "xyxy_1000": "[[100, 200, 300, 900]]",
    "yxyx_1000": "[200, 100, 900, 300]",
    "internvl": "<ref>the dog</ref><box>[[100, 200, 300, 900]]</box>",
    "qwen2_vl": "<|object_ref_start|>the dog<|object_ref_end|><|box_start|>(100,200),(300,900)<|box_end|>",
    "qwen2_5_vl": '```json\n[\n\t{"bbox_2d": [200, 100, 600, 450], "label": "the dog"}\n]\n```',
    "qwen3_vl": '{"bbox_2d": [100, 200, 300, 900], "label": "the dog"}',
    "gemini": '[{"box_2d": [200, 100, 900, 300], "label": "the dog"}]',
}


def test_every_format_has_an_answer() -> None:
    assert {*ANSWERS, "qwen_vl"} == set(BOX_FORMATS)


@pytest.mark.parametrize("name", ANSWERS)
def test_the_same_box_in_every_format(name: str) -> None:
    result = read_boxes_of(name, ANSWERS[name], WIDE, label="the dog")
    assert result.is_strict
    assert result.items == (GroundedPhrase("the dog", (BOX,)),)


def test_qwen_vl_counts_to_999() -> None:
    """As its evaluation does: 999 is the image's edge."""
    result = read_boxes_of("qwen_vl", "<ref> dogs</ref><box>(0,0),(999,999)</box><box>(333,0),(666,999)</box>", WIDE)
    assert [item.phrase for item in result.items] == ["dogs", "dogs"]
    first, second = (item.boxes[0] for item in result.items)
    assert (first.x2, first.y2) == pytest.approx((2000, 500))
    assert (second.x1, second.x2) == pytest.approx((2000 / 3, 4000 / 3))


def test_labels_hold_until_the_next_one() -> None:
    text = (
        "<box>[[0,0,10,10]]</box> <ref>a</ref><box>[[1,1,2,2],[3,3,4,4]]</box> and <ref>b</ref><box>[[5,5,6,6]]</box>"
    )
    found = read_boxes_of("internvl", text, ImageGeometry(1000, 1000), label="asked")
    assert [(item.phrase, item.boxes[0].x1) for item in found.items] == [("asked", 0), ("a", 1), ("a", 3), ("b", 5)]


@pytest.mark.parametrize(
    ("name", "text", "kinds", "count"),
    [
        ("pixels", "no box", ["no_coordinates"], 0),
        ("pixels", "[1, 2, 3]", ["wrong_count"], 0),
        ("pixels", "[1, 2, x3, 4] [5, 6, 7, 8]", ["not_a_number"], 1),
        ("pixels", "[3, 2, 1, 4]", ["swapped_corners"], 0),
        ("pixels", "[1, 2, 3, 1e999]", ["not_a_number"], 0),
        ("yxyx_1000", "[1, 900, 2, 3]", ["swapped_corners"], 0),
        ("qwen2_5_vl", 'It is {"bbox_2d": [1, 2, 3, 4]}.', ["wording"], 1),
        ("qwen2_5_vl", '[{"bbox_2d": [1, 2, 3, 4], "label": "a"}, {"bbox_2d": [1, 2', ["wording"], 1),
        ("qwen2_5_vl", '[{"bbox": [1, 2, 3, 4]}, {"bbox_2d": ["1", 2, 3, 4]}]', ["wrong_count", "wrong_count"], 0),
        ("qwen2_5_vl", f'{{"bbox_2d": [1, 2, 3, 1{"0" * 400}]}}', ["wrong_count"], 0),
        ("qwen2_vl", "<box>(1,2),(3,4)</box>", ["no_coordinates"], 0),
    ],
)
def test_faults(name: str, text: str, kinds: list[str], count: int) -> None:
    result = read_boxes_of(name, text, ImageGeometry(1000, 1000))
    assert [error.kind for error in result.errors] == kinds
    assert len(result.items) == count


def test_boxes_are_not_clipped() -> None:
    (item,) = read_boxes_of("xyxy_1000", "[-10, 0, 1100, 900]", ImageGeometry(100, 100)).items
    assert item.boxes == (Box(-1, 0, 110, 90),)


def test_an_unknown_format() -> None:
    with pytest.raises(DataError, match=r"unknown box format 'qwen3_v'; did you mean 'qwen3_vl'\? Known: pixels, xyxy"):
        read_boxes_of("qwen3_v", "", WIDE)


@pytest.mark.parametrize("name", BOX_FORMATS)
@pytest.mark.parametrize("piece", ["[", "<ref>", "<box>", "<|box_start|>(", "{", "[1,2,3,4", "1", "[1,2,3]"])
def test_long_answers_take_linear_time(name: str, piece: str) -> None:
    read_boxes_of(name, piece * (60_000 // len(piece)), WIDE)  # quadratic reading would meet the suite's time limit
