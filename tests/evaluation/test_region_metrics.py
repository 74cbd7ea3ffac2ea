from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from sphinxkit.errors import DataError, RegistryError
from sphinxkit.evaluation import benchmarks, metrics
from sphinxkit.evaluation.annotation import Annotation, Record
from sphinxkit.formatters import tasks
from sphinxkit.formatters.tasks import GroundedPhrase, Keypoints, LayoutSample, PoseSample
from sphinxkit.geometry import Box, ImageGeometry, Point

GEOMETRY = ImageGeometry(200, 100)
HAS_COCO = importlib.util.find_spec("pycocotools") is not None


def _record(prediction: str, gold: Any, **fields: Any) -> Record:
    return Record(Annotation(0, "", "", gold, "a.json:1", (200, 100), fields), prediction)


def test_every_task_has_its_metric() -> None:
    for name in tasks.names():
        assert metrics.get(tasks.create(name).metric)


def test_unknown_metric() -> None:
    with pytest.raises(RegistryError, match="unknown metric 'acuracy'; did you mean 'accuracy'"):
        metrics.score("acuracy", [])


def test_precision_at_1_strict_and_lenient() -> None:
    gold = [20, 10, 120, 60]  # in the square: 0.1, 0.3, 0.6, 0.55
    answers = ["[0.100,0.300,0.600,0.550]", "0.100,0.300,0.600,0.550", "[0.600,0.550,0.100,0.300]", "nothing"]
    result = metrics.score("precision_at_1", [_record(answer, gold) for answer in answers])
    assert result.scores == {"precision_at_1": 0.5}
    assert result.lenient == {"precision_at_1": 0.75}
    assert result.unparsable == 1


def test_an_overlap_of_exactly_half_is_a_hit() -> None:
    square = Annotation(0, "", "", [0, 0, 100, 100], "a.json:1", (200, 200), {})
    result = metrics.score("precision_at_1", [Record(square, "[0.000,0.000,0.500,0.250]")])
    assert result.scores == result.lenient == {"precision_at_1": 1.0}


def test_a_gold_box_with_swapped_corners_names_its_annotation() -> None:
    with pytest.raises(DataError, match=r"^a.json:1: box \(120.0, 10.0, 20.0, 60.0\): its corners are swapped"):
        metrics.score("precision_at_1", [_record("[0.1,0.3,0.6,0.55]", [120, 10, 20, 60])])


def _detection(prediction: str, gold: Any) -> metrics.MetricResult:
    return metrics.score("detection_f1", [_record(prediction, gold)])


DOGS = "<p>dog</p>[0.100,0.300,0.600,0.550;0.700,0.300,0.900,0.600]"


@pytest.mark.parametrize(
    "gold",
    [
        DOGS,
        {"dog": [[20, 10, 120, 60], [140, 10, 180, 70]]},
        [{"category": "dog", "boxes": [[20, 10, 120, 60], [140, 10, 180, 70]]}],
        [{"label": "dog", "box": [20, 10, 120, 60]}, {"phrase": "dog", "box": [140, 10, 180, 70]}],
    ],
)
def test_detection_takes_gold_boxes_in_several_forms(gold: Any) -> None:
    result = _detection(DOGS, gold)
    assert result.scores["f1"] == result.scores["precision"] == result.scores["recall"] == 1.0
    assert result.scores["f1_by_label"] == {"dog": 1.0}
    if HAS_COCO:
        assert result.scores["ap"] == pytest.approx(1.0)


def test_detection_counts_misses_and_extras() -> None:
    scores = _detection(
        "<p>dog</p>[0.100,0.300,0.600,0.550;0.000,0.250,0.050,0.300;0.900,0.300,0.990,0.400]", DOGS
    ).scores
    assert scores["precision"] == pytest.approx(1 / 3)
    assert scores["recall"] == 0.5
    assert scores["f1"] == pytest.approx(0.4)


def test_an_answer_that_needs_a_repair_counts_only_leniently() -> None:
    result = _detection(DOGS.removesuffix("]"), DOGS)
    assert result.scores["f1"] == 0.0
    assert result.lenient["f1"] == 1.0
    assert result.unparsable == 0
    assert _detection("no dogs here", DOGS).unparsable == 1


def test_layout_in_both_sets_of_classes() -> None:
    for classes, name, label in (
        ("publaynet", "layout_f1", "table"),
        ("doclaynet", "layout_f1_doclaynet", "Page-footer"),
    ):
        sample = LayoutSample({label: (Box(20, 10, 120, 60),)}, GEOMETRY)
        answer = tasks.create("layout", classes=classes).format(sample).answer
        result = metrics.score(name, [_record(answer, answer)])
        assert result.scores["f1"] == 1.0
        assert result.unparsable == 0


def test_text_spotting() -> None:
    gold = [{"text": "STOP", "box": [20, 10, 120, 60]}, {"text": "go", "box": [140, 10, 180, 70]}]
    right = "<p>go</p>[0.700,0.300,0.900,0.600] <p>stop</p>[0.100,0.300,0.600,0.550]"
    swapped = "<p>stop</p>[0.700,0.300,0.900,0.600] <p>go</p>[0.100,0.300,0.600,0.550]"
    half = "<p>go</p>[0.700,0.300,0.900,0.600] <p>slop</p>[0.100,0.300,0.600,0.550]"
    scores = [metrics.score("text_detection_f1", [_record(answer, gold)]).scores for answer in (right, swapped, half)]
    assert scores[0] == {"f1": 1.0, "exact": 1.0, "recall_text": 1.0}
    assert scores[1] == {"f1": 0.0, "exact": 1.0, "recall_text": 1.0}
    assert scores[2] == {"f1": 0.5, "exact": 0.0, "recall_text": 0.5}


def test_grounded_caption_and_relation_recall() -> None:
    gold = "<p>A dog</p>[0.100,0.300,0.600,0.550] by <p>a tree</p>[0.700,0.300,0.900,0.600]"
    half = "<p>a dog</p>[0.100,0.300,0.600,0.550] by <p>a house</p>[0.700,0.300,0.900,0.600]"
    scores = metrics.score("grounded_recall", [_record(half, gold), _record(gold, gold)]).scores
    assert scores == {"recall": 0.75, "precision": 0.75, "f1": 0.75, "exact": 0.5}
    relation = "<p>dog</p>[0.100,0.300,0.600,0.550] <p>tree</p>[0.700,0.300,0.900,0.600]"
    assert metrics.score("relation_recall", [_record(relation, relation)]).scores["exact"] == 1.0


def test_pose() -> None:
    points = {"nose": Point(30, 20), "left_knee": Point(60, 50)}
    sample = PoseSample(Keypoints(points), Box(20, 10, 120, 60), GEOMETRY)
    answer = tasks.create("pose").format(sample).answer
    gold = {name: [point.x, point.y] for name, point in points.items()}
    moved = answer.replace("0.150,0.350", "0.250,0.350")  # the nose by 20 px: out of reach, 0.1 of 100 px
    records = [_record(answer, gold, box=[20, 10, 120, 60]), _record(moved, answer, box=[20, 10, 120, 60], area=5000)]
    result = metrics.score("pck", records)
    assert result.scores["pck"] == 0.75
    assert 0.5 < result.scores["oks"] < 1.0
    if HAS_COCO:
        # the second person's OKS is 0.5: found at the threshold 0.50, missed at the nine others
        assert result.scores["ap"] == pytest.approx(0.55, abs=0.01)
    assert metrics.score("pck", [_record("", gold)]).unparsable == 1


@pytest.mark.parametrize(
    ("metric", "gold", "message"),
    [
        ("precision_at_1", "x", r"a\.json:1: expected 4 finite numbers, got 'x'"),
        ("precision_at_1", [1, 2, 3], r"a\.json:1: expected 4 finite numbers"),
        ("precision_at_1", [1, 2, 3, 10**400], r"a\.json:1: expected 4 finite numbers"),
        ("detection_f1", "[0.1", r"a\.json:1: gt_answers is no answer of task 'detection'"),
        ("detection_f1", 3, r"a\.json:1: gt_answers must be text, an object or a list, got 3"),
        ("detection_f1", [{"boxes": []}], r"a\.json:1: expected a label and 'boxes' or 'box'"),
        ("pck", [], r"a\.json:1: gt_answers must be text or \{name: \[x, y\]\}"),
        ("pck", {}, r"a\.json:1: there are no key points in gt_answers"),
        ("pck", {"nose": [1]}, r"a\.json:1: expected 2 finite numbers"),
    ],
)
def test_bad_gold(metric: str, gold: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        metrics.score(metric, [_record("x", gold)])


def test_a_bad_area() -> None:
    with pytest.raises(DataError, match=r"a\.json:1: area must be a finite number, got 'x'"):
        metrics.score("pck", [_record("", {"nose": [1, 2]}, area="x")])


def test_what_the_strict_rule_reads_is_right_for_the_lenient_one_as_well() -> None:
    # the tolerant parser refuses a value of 1.2, the strict rule takes it as it stands
    result = metrics.score("precision_at_1", [_record("[0.000,0.250,1.200,0.750]", [0, 0, 200, 100])])
    assert result.scores == result.lenient == {"precision_at_1": 1.0}


def test_grounded_phrases_without_boxes_are_no_gold() -> None:
    assert GroundedPhrase("x", ()).boxes == ()
    assert metrics.score("detection_f1", [_record("<p>dog</p>[]", {"dog": []})]).scores["f1"] == 1.0


@pytest.mark.parametrize(
    ("box_format", "answer"),
    [("qwen2_vl", "<|box_start|>(100,200),(300,900)<|box_end|>"), ("yxyx_1000", "[200, 100, 900, 300]")],
)
def test_boxes_of_other_models_by_option(tmp_path: Path, box_format: str, answer: str) -> None:
    golds = [
        {"question_id": n, "question": "dog", "gt_answers": box, "width": 2000, "height": 500}
        for n, box in enumerate(([200, 100, 600, 450], [200, 100, 600, 275], [200, 100, 600, 274]))
    ]
    (tmp_path / "a.json").write_text(json.dumps(golds))
    (tmp_path / "p.json").write_text(json.dumps([answer] * 3))
    files = (tmp_path / "a.json", tmp_path / "p.json")
    report = benchmarks.score("rec", *files, box_format=box_format)
    # IoU 1, exactly 0.5, and just below
    assert report.scores == report.lenient == {"precision_at_1": pytest.approx(2 / 3)}
    assert report.manifest["box_format"] == box_format
    assert benchmarks.score("rec", *files).scores == {"precision_at_1": 0.0}  # nothing is guessed
    with pytest.raises(DataError, match="benchmark 'vqa' has no boxes: a box format cannot be given"):
        benchmarks.score("vqa", *files, box_format=box_format)


def test_detections_of_other_models(tmp_path: Path) -> None:
    gold = {"question_id": 1, "category": "dog", "width": 200, "height": 100}
    (tmp_path / "a.json").write_text(json.dumps([{**gold, "gt_answers": {"dog": [[20, 10, 120, 60], [0, 0, 9, 9]]}}]))
    answer = 'Here: [{"bbox_2d": [20, 10, 120, 60], "label": "Dog"}]'
    (tmp_path / "p.json").write_text(json.dumps([answer]))
    report = benchmarks.score("detection", tmp_path / "a.json", tmp_path / "p.json", box_format="qwen2_5_vl")
    assert report.lenient["f1"] == pytest.approx(2 / 3)
    assert report.scores["f1"] == 0.0  # words around the JSON are a repair
