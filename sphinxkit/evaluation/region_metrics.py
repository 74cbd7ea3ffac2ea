"""The metrics of answers with boxes and points: functions of scored records.

Answers are read with the task's tolerant parser. The strict scores count an answer that needed any repair as empty; the
lenient ones use what was read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from sphinxkit.data.json_stream import is_finite_number
from sphinxkit.errors import DataError
from sphinxkit.evaluation.annotation import Annotation, Record
from sphinxkit.evaluation.coco_eval import Detections, average_precision, keypoint_precision
from sphinxkit.evaluation.regions import (
    IOU_THRESHOLD,
    LabelledBox,
    MatchCounts,
    normalize_label,
    oks,
    pck,
    read_box_strictly,
    square_iou,
)
from sphinxkit.evaluation.result import Metric, MetricResult
from sphinxkit.formatters import tasks
from sphinxkit.formatters.tasks.base import GroundedPhrase, Keypoints, ParseResult
from sphinxkit.geometry import Box, Point

ScoreBoxes = Callable[[list[list[LabelledBox]], list[list[LabelledBox]]], dict[str, Any]]
"""(predicted boxes per image, gold boxes per image) -> scores."""

Task = tasks.Task[Any, Any]
WITHOUT_AP = "AP is left out: there are no gold boxes or pycocotools is not installed"
LABEL_KEYS = ("phrase", "category", "label", "text", "name")


def _numbers(annotation: Annotation, value: Any, count: int) -> list[float]:
    good = isinstance(value, (list, tuple)) and len(value) == count
    if not good or not all(map(is_finite_number, value)):
        raise DataError(f"{annotation.where}: expected {count} finite numbers, got {value!r:.80}")
    return [float(x) for x in value]


def _box(annotation: Annotation, value: Any) -> Box:
    try:
        return Box(*_numbers(annotation, value, 4))
    except DataError as error:
        raise DataError(f"{annotation.where}: {str(error).removeprefix(f'{annotation.where}: ')}") from error


def gold_box(annotation: Annotation) -> Box:
    """``gt_answers`` as one box [x1, y1, x2, y2] in original pixels.

    Raises:
        DataError: It is something else.
    """
    return _box(annotation, annotation.gold)


def _read(task: Task, text: str, annotation: Annotation) -> ParseResult[Any]:
    return task.parse(text, annotation.geometry)


def _answer(task: Task, record: Record) -> ParseResult[Any]:
    return _read(task, record.prediction, record.annotation) if record.boxes is None else record.boxes


def _phrases(result: ParseResult[Any]) -> list[LabelledBox]:
    return [(item.phrase, box) for item in result.items if isinstance(item, GroundedPhrase) for box in item.boxes]


def gold_labelled_boxes(annotation: Annotation, task: Task) -> list[LabelledBox]:
    """``gt_answers`` as labelled boxes in original pixels.

    One of: the task's own answer text; {label: [[x1, y1, x2, y2], ...]}; a list of {"phrase" (or "category", "label",
    "text", "name"), "boxes": [...] or "box": [...]}.

    Raises:
        DataError: It is something else, or the text has a fault.
    """
    gold = annotation.gold
    if isinstance(gold, str):
        result = _read(task, gold, annotation)
        if not result.is_strict:
            raise DataError(f"{annotation.where}: gt_answers is no answer of task {task.name!r}: {result.errors[0]}")
        return _phrases(result)
    if isinstance(gold, dict):
        gold = [{"label": label, "boxes": boxes} for label, boxes in gold.items()]
    if not isinstance(gold, list):
        raise DataError(
            f"{annotation.where}: gt_answers must be text, an object or a list, got {annotation.gold!r:.80}"
        )
    found = []
    for entry in gold:
        label = next((entry[key] for key in LABEL_KEYS if key in entry), None) if isinstance(entry, dict) else None
        boxes = entry.get("boxes", [entry["box"]] if "box" in entry else None) if isinstance(entry, dict) else None
        if not isinstance(label, str) or not isinstance(boxes, list):
            raise DataError(f"{annotation.where}: expected a label and 'boxes' or 'box', got {entry!r:.80}")
        found += [(label, _box(annotation, box)) for box in boxes]
    return found


def _gold_points(annotation: Annotation, task: Task) -> dict[str, Point]:
    gold = annotation.gold
    if isinstance(gold, str):
        items = _read(task, gold, annotation).items
        return dict(items[0].points) if items and isinstance(items[0], Keypoints) else {}
    if not isinstance(gold, dict):
        raise DataError(f"{annotation.where}: gt_answers must be text or {{name: [x, y]}}, got {gold!r:.80}")
    return {str(name): Point(*_numbers(annotation, point, 2)) for name, point in gold.items()}


def precision_at_1(records: Sequence[Record]) -> MetricResult:
    """The share of boxes with IoU >= 0.5 in the padded square; the lenient value reads the box tolerantly.

    Source: Kazemzadeh et al., ReferItGame, EMNLP 2014; the rules of reading are LLaMA2-Accessory's.
    """
    strict = lenient = unparsable = 0
    task = tasks.create("rec")
    for record in records:
        annotation, gold = record.annotation, gold_box(record.annotation)
        if record.boxes is not None:
            boxes = [box for _, box in _phrases(record.boxes)]
            is_found = bool(boxes) and boxes[0].iou(gold) >= IOU_THRESHOLD
            is_hit = is_found and record.boxes.is_strict
            unparsable += not boxes
        else:
            corners = read_box_strictly(record.prediction)
            unparsable += corners is None
            is_hit = square_iou(corners, gold, annotation.geometry) >= IOU_THRESHOLD
            read = [item for item in _answer(task, record).items if isinstance(item, Box)]
            is_found = is_hit or (bool(read) and read[0].iou(gold) >= IOU_THRESHOLD)
        strict += is_hit
        lenient += is_found
    count = max(len(records), 1)
    return MetricResult({"precision_at_1": strict / count}, unparsable, {"precision_at_1": lenient / count})


def _both(records: Sequence[Record], task: Task, score: ScoreBoxes) -> MetricResult:
    golds = [gold_labelled_boxes(record.annotation, task) for record in records]
    results = [_answer(task, record) for record in records]
    lenient = [_phrases(result) for result in results]
    strict = [boxes if result.is_strict else [] for boxes, result in zip(lenient, results, strict=True)]
    unparsable = sum(not result.items for result in results)
    return MetricResult(score(strict, golds), unparsable, score(lenient, golds))


def detection(task: str, **options: Any) -> Metric:
    """F1, precision and recall of labelled boxes at IoU 0.5, F1 per label, COCO's AP where pycocotools is installed.

    Args:
        task: The task whose parser reads the answers.
        options: The task's.
    """

    def score(predictions: list[list[LabelledBox]], golds: list[list[LabelledBox]]) -> dict[str, Any]:
        counts = MatchCounts()
        for predicted, gold in zip(predictions, golds, strict=True):
            counts.add(predicted, gold)
        scores: dict[str, Any] = {"f1": counts.f1, "precision": counts.precision, "recall": counts.recall}
        scores["f1_by_label"] = {label: counts.labels[label].f1 for label in sorted(counts.labels)}
        return scores | average_precision([Detections(p, g) for p, g in zip(predictions, golds, strict=True)])

    def metric(records: Sequence[Record]) -> MetricResult:
        result = _both(records, tasks.create(task, **options), score)
        notes = (
            "strict scores count an answer that needed a repair as empty",
            "AP: answers carry no scores, so every box has score 1 and ties keep the file's order; F1 says more"
            if "ap" in result.scores
            else WITHOUT_AP,
        )
        return MetricResult(result.scores, result.unparsable, result.lenient, notes)

    return metric


def text_spotting(records: Sequence[Record]) -> MetricResult:
    """Texts with boxes: F1 where text and box (IoU 0.5) agree, ``exact`` and ``recall_text`` of the texts alone.

    ``exact`` is the share of images all of whose texts are read, and nothing else, in any order.
    """

    def texts(boxes: list[LabelledBox]) -> Counter[str]:
        return Counter(normalize_label(label) for label, _ in boxes)

    def score(predictions: list[list[LabelledBox]], golds: list[list[LabelledBox]]) -> dict[str, Any]:
        counts, exact, found, total = MatchCounts(), 0, 0, 0
        for predicted, gold in zip(predictions, golds, strict=True):
            counts.add(predicted, gold)
            said, true = texts(predicted), texts(gold)
            exact += said == true
            found += sum((said & true).values())
            total += sum(true.values())
        return {
            "f1": counts.f1,
            "exact": exact / len(golds) if golds else 0.0,
            "recall_text": found / total if total else 1.0,
        }

    return _both(records, tasks.create("text_detection"), score)


def phrase_recall(task: str) -> Metric:
    """Recall of gold (phrase, box) pairs at IoU 0.5, and ``exact``, the share of images with all of them.

    Args:
        task: The task whose parser reads the answers.
    """

    def score(predictions: list[list[LabelledBox]], golds: list[list[LabelledBox]]) -> dict[str, Any]:
        counts, exact = MatchCounts(), 0
        for predicted, gold in zip(predictions, golds, strict=True):
            exact += counts.add(predicted, gold) == len(gold)
        return {
            "recall": counts.recall,
            "precision": counts.precision,
            "f1": counts.f1,
            "exact": exact / len(golds) if golds else 0.0,
        }

    return lambda records: _both(records, tasks.create(task), score)


def pose(records: Sequence[Record]) -> MetricResult:
    """PCK at 0.1 of the person's longer side, mean OKS, and COCO's key-point AP where pycocotools is installed.

    The person's box is the annotation's ``box`` [x1, y1, x2, y2], else that of the gold points; its area stands for the
    person's ``area`` where the annotation has none.
    """
    totals = {"strict": [0, 0], "lenient": [0, 0]}
    similarity = {"strict": 0.0, "lenient": 0.0}
    people: dict[str, list[Any]] = {"strict": [], "lenient": []}
    unparsable = 0
    task = tasks.create("pose")
    for record in records:
        annotation = record.annotation
        gold = _gold_points(annotation, task)
        if not gold:
            raise DataError(f"{annotation.where}: there are no key points in gt_answers")
        values = annotation.fields.get("box")
        xs, ys = [point.x for point in gold.values()], [point.y for point in gold.values()]
        box = _box(annotation, values) if values else Box(min(xs), min(ys), max(xs), max(ys))
        area = annotation.fields.get("area", box.area)
        if not is_finite_number(area):
            raise DataError(f"{annotation.where}: area must be a finite number, got {area!r:.80}")
        result = _read(task, record.prediction, annotation)
        read = next((dict(item.points) for item in result.items if isinstance(item, Keypoints)), {})
        unparsable += not read
        for kind, points in (("strict", read if result.is_strict else {}), ("lenient", read)):
            correct, count = pck(points, gold, box)
            totals[kind][0] += correct
            totals[kind][1] += count
            similarity[kind] += oks(points, gold, float(area))
            people[kind].append((points, gold, box, float(area)))

    def scores(kind: str) -> dict[str, Any]:
        correct, count = totals[kind]
        mean_oks = similarity[kind] / max(len(records), 1)
        return {"pck": correct / max(count, 1), "oks": mean_oks, **keypoint_precision(people[kind])}

    notes = () if "ap" in scores("strict") else (WITHOUT_AP,)
    return MetricResult(scores("strict"), unparsable, scores("lenient"), notes)
