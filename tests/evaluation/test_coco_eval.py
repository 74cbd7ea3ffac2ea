from __future__ import annotations

import random

import pytest

from sphinxkit.evaluation import coco_eval
from sphinxkit.evaluation.coco_eval import Detections, average_precision, keypoint_precision
from sphinxkit.formatters.tasks import COCO_KEYPOINTS
from sphinxkit.geometry import Box, Point

pytest.importorskip("pycocotools")
INTERPOLATION = 0.01  # COCO averages precision over 101 recall levels
BIG = Box(0, 0, 100, 100)


def test_ap_of_perfect_and_missing_answers() -> None:
    perfect = average_precision([Detections([("dog", BIG)], [("Dog", BIG)])])
    assert perfect == {"ap": pytest.approx(1.0), "ap50": pytest.approx(1.0), "ap75": pytest.approx(1.0)}
    half = average_precision([Detections([("dog", BIG)], [("dog", BIG)]), Detections([], [("dog", BIG)])])
    assert half["ap"] == pytest.approx(0.5, abs=INTERPOLATION)
    assert average_precision([Detections([], [("dog", BIG)])]) == {"ap": 0.0, "ap50": 0.0, "ap75": 0.0}


def test_ap_by_overlap() -> None:
    # IoU 0.6: right at the thresholds 0.50, 0.55 and 0.60, of ten
    scores = average_precision([Detections([("dog", Box(0, 0, 100, 60))], [("dog", BIG)])])
    assert scores["ap50"] == pytest.approx(1.0)
    assert scores["ap75"] == pytest.approx(0.0)
    assert scores["ap"] == pytest.approx(0.3, abs=INTERPOLATION)


def test_a_label_that_is_nowhere_has_no_ap_and_no_gold_has_none() -> None:
    assert average_precision([Detections([("cat", BIG), ("dog", BIG)], [("dog", BIG)])])["ap"] == pytest.approx(1.0)
    assert average_precision([Detections([("cat", BIG)], [])]) == {}
    assert keypoint_precision([]) == {}


def test_keypoint_ap() -> None:
    points = {name: Point(10.0 + index, 20.0 + index) for index, name in enumerate(COCO_KEYPOINTS)}
    person = (points, points, BIG, 5000.0)
    assert keypoint_precision([person])["ap"] == pytest.approx(1.0)
    assert keypoint_precision([person, ({}, points, BIG, 5000.0)])["ap"] == pytest.approx(0.5, abs=INTERPOLATION)


def test_without_pycocotools_there_is_no_ap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco_eval, "find_coco", lambda: None)
    assert average_precision([Detections([], [("dog", BIG)])]) == {}
    assert keypoint_precision([({}, {"nose": Point(1, 1)}, BIG, 1.0)]) == {}


def test_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    average_precision([Detections([("dog", BIG)], [("dog", BIG)])])
    assert capsys.readouterr().out == ""


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["boxes", "people"])
def test_faster_coco_eval_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    pytest.importorskip("faster_coco_eval")
    draw = random.Random(0)

    def box() -> Box:
        x, y = draw.uniform(0, 80), draw.uniform(0, 80)
        return Box(x, y, x + draw.uniform(1, 20), y + draw.uniform(1, 20))

    def near(of: Box) -> Box:
        return Box(of.x1 + draw.uniform(-2, 1), of.y1, of.x2 + draw.uniform(1, 4), of.y2)

    def score() -> dict[str, float]:
        draw.seed(1)
        golds = [[(draw.choice("ab"), box()) for _ in range(5)] for _ in range(30)]
        if kind == "boxes":
            return average_precision(
                [Detections([(label, near(each)) for label, each in gold], gold) for gold in golds]
            )
        points = [{name: Point(draw.uniform(0, 99), 5.0) for name in COCO_KEYPOINTS} for _ in golds]
        moved = [{name: Point(p.x + draw.uniform(0, 9), p.y) for name, p in person.items()} for person in points]
        return keypoint_precision([(there, here, BIG, 5000.0) for there, here in zip(moved, points, strict=True)])

    assert coco_eval.find_coco() == "faster_coco_eval"
    fast = score()
    monkeypatch.setattr(coco_eval, "find_coco", lambda: "pycocotools")
    assert 0 < fast["ap"] < 1
    assert fast == pytest.approx(score(), abs=1e-9)
