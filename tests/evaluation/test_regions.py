from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sphinxkit.evaluation.regions import (
    MatchCounts,
    match_boxes,
    normalize_label,
    oks,
    pck,
    read_box_strictly,
    square_iou,
)
from sphinxkit.geometry import Box, ImageGeometry, Point

ROUNDING = 1e-12  # of float64 sums


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[0.1,0.2,0.3,0.4]", (0.1, 0.2, 0.3, 0.4)),
        ("The region is [ 0.1 , .2, 3e-1,0.4 ].", (0.1, 0.2, 0.3, 0.4)),
        ("[0.1,0.2,0.3,0.4] and [0.5,0.5,0.6,0.6]", (0.1, 0.2, 0.3, 0.4)),
        ("0.1,0.2,0.3,0.4] rest", (0.1, 0.2, 0.3, 0.4)),
        ("0.1,0.2,0.3,0.4", (0.1, 0.2, 0.3, 0.4)),
        ("[0.1,0.2,0.3,0.4", None),
        ("[0.1 0.2,0.3,0.4]", None),
        ("[0.1,0.2,0.3]", None),
        ("[] [0.1,0.2,0.3,0.4]", None),
        ("[0.1,0.2,0.3,nan]", None),
        ("[0.6,0.55,0.1,0.3]", (0.6, 0.55, 0.1, 0.3)),  # swapped corners are neither refused nor repaired
        ("I cannot find it.", None),
    ],
)
def test_read_box_strictly(text: str, wanted: tuple[float, ...] | None) -> None:
    assert read_box_strictly(text) == wanted


def test_square_iou_in_the_padded_square() -> None:
    # 200 x 100: the image sits 50 px down in a square of 200
    gold = Box(20, 10, 120, 60)
    geometry = ImageGeometry(200, 100)
    assert square_iou((0.1, 0.3, 0.6, 0.55), gold, geometry) == pytest.approx(1.0)
    assert square_iou((0.1, 0.3, 0.6, 0.425), gold, geometry) == pytest.approx(0.5)
    assert square_iou((0.6, 0.55, 0.1, 0.3), gold, geometry) == 0.0  # swapped corners are not repaired
    assert square_iou(None, gold, geometry) == 0.0


def test_the_odd_pixel_of_padding_is_below() -> None:
    # 101 - 100 = 1: floor(1 / 2) = 0 pixels above
    assert square_iou((0, 0, 1, 100 / 101), Box(0, 0, 101, 100), ImageGeometry(101, 100)) == pytest.approx(1.0)


def test_labels_are_compared_without_case_and_underscores() -> None:
    assert normalize_label(" Left_Eye. ") == "left eye"


def test_match_boxes_is_one_to_one_and_takes_the_largest_overlap_first() -> None:
    golds = [("dog", Box(0, 0, 10, 10)), ("dog", Box(0, 0, 10, 8))]
    predictions = [
        ("Dog", Box(0, 0, 10, 8)),
        ("dog", Box(0, 0, 10, 10)),
        ("dog", Box(0, 0, 10, 9)),
        ("cat", golds[0][1]),
    ]
    assert sorted(match_boxes(predictions, golds)) == [(0, 1), (1, 0)]


def test_an_overlap_of_exactly_half_matches() -> None:
    half, whole = Box(0, 0, 100, 50), Box(0, 0, 100, 100)
    assert match_boxes([("cat", half)], [("cat", whole)]) == [(0, 0)]
    assert match_boxes([("cat", Box(0, 0, 100, 49))], [("cat", whole)]) == []


def test_match_counts_by_hand() -> None:
    counts = MatchCounts()
    square = Box(0, 0, 10, 10)
    assert counts.add([("dog", square), ("cat", square)], [("dog", square), ("dog", Box(20, 20, 30, 30))]) == 1
    assert counts.add([], [("cat", square)]) == 0
    assert (counts.matched, counts.predicted, counts.gold) == (1, 2, 3)
    assert counts.precision == 0.5
    assert counts.recall == pytest.approx(1 / 3)
    assert counts.f1 == pytest.approx(2 / 5)
    assert counts.labels["dog"].f1 == pytest.approx(2 / 3)
    assert counts.labels["cat"].f1 == 0.0


def test_nothing_predicted_where_nothing_is_there_is_right() -> None:
    counts = MatchCounts()
    counts.add([], [])
    assert (counts.precision, counts.recall, counts.f1) == (1.0, 1.0, 1.0)


boxes = st.tuples(*[st.integers(0, 20)] * 4).map(
    lambda v: Box(min(v[0], v[2]), min(v[1], v[3]), max(v[0], v[2]) + 1, max(v[1], v[3]) + 1)
)
labelled = st.lists(st.tuples(st.sampled_from(["a", "b"]), boxes), max_size=5)


@given(labelled, labelled)
def test_matches_are_one_to_one_of_equal_labels_and_enough_overlap(predictions: list, golds: list) -> None:
    pairs = match_boxes(predictions, golds)
    assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)
    assert all(predictions[i][0] == golds[j][0] and predictions[i][1].iou(golds[j][1]) >= 0.5 for i, j in pairs)
    assert len(match_boxes(golds, golds)) == len(golds)


def test_pck_by_hand() -> None:
    box = Box(0, 0, 50, 100)  # reach 10
    gold = {"nose": Point(10, 10), "left_eye": Point(20, 20), "right_eye": Point(30, 30)}
    prediction = {"nose": Point(16, 18), "left eye": Point(27, 28)}  # 10.0 and 10.6 px off
    assert pck(prediction, gold, box) == (1, 3)


def test_oks_by_hand() -> None:
    gold = {"nose": Point(0, 0), "left_knee": Point(5, 5), "tail": Point(1, 1)}  # a name that COCO lacks does not count
    prediction = {"nose": Point(3, 4)}
    wanted = math.exp(-25 / (2 * 1000 * (2 * 0.026) ** 2)) / 2
    assert oks(prediction, gold, 1000.0) == pytest.approx(wanted, abs=ROUNDING)
    assert oks(gold, gold, 1000.0) == 1.0
    assert oks(prediction, {}, 1000.0) == 0.0
    assert oks(prediction, gold, 0.0) == 0.0
