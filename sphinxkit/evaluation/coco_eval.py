"""COCO's average precision through pycocotools or faster-coco-eval, for answers that carry no scores.

Policy: every box or person of an answer has score 1 and ties keep the order of the file, so AP is that of one operating
point; F1 and PCK say more about a model that answers in words.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sphinxkit.data.json_stream import is_finite_number, is_json_lines, iter_json
from sphinxkit.errors import DataError
from sphinxkit.evaluation.regions import LabelledBox, normalize_label
from sphinxkit.evaluation.result import MetricResult
from sphinxkit.formatters.tasks import COCO_KEYPOINTS
from sphinxkit.geometry import Box, Point

Person = tuple[Mapping[str, Point], Mapping[str, Point], Box, float]
"""Predicted points, gold points, gold box, gold area."""

# What COCO's evaluation sums up, in its order. Source: cocodataset.org, detection evaluation.
NAMES = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large"),
)
RESULT_FIELDS = ("image_id", "category_id", "bbox", "score")


@dataclass(frozen=True, slots=True)
class Detections:
    """One image's predicted and gold boxes."""

    predictions: list[LabelledBox]
    golds: list[LabelledBox]


def find_coco() -> str | None:
    """The package of COCO's evaluation that is installed: faster_coco_eval, else pycocotools, else None.

    ``pip install sphinxkit[eval]`` installs pycocotools, ``sphinxkit[eval-fast]`` faster-coco-eval; both give the same
    numbers.
    """
    found = (name for name in ("faster_coco_eval", "pycocotools") if importlib.util.find_spec(name) is not None)
    return next(found, None)


def _tools() -> tuple[Any, Any]:
    """The classes COCO and COCOeval of the package that is installed."""
    if find_coco() == "faster_coco_eval":
        faster: Any = importlib.import_module("faster_coco_eval")
        return faster.COCO, faster.COCOeval_faster
    coco: Any = importlib.import_module("pycocotools.coco")  # it has no types
    cocoeval: Any = importlib.import_module("pycocotools.cocoeval")
    return coco.COCO, cocoeval.COCOeval


def _evaluate(
    kind: str, gold: dict[str, Any], found: list[dict[str, Any]], names: tuple[str, ...] = NAMES[:3]
) -> dict[str, float]:
    if not gold["annotations"]:
        return {}
    if not found:
        return dict.fromkeys(names, 0.0)
    coco, coco_eval = _tools()
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it goes
        truth = coco()
        truth.dataset = gold
        truth.createIndex()
        evaluation = coco_eval(truth, truth.loadRes(found), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # -1 stands for a mean over nothing: no gold object of this size
    return {name: float(value) for name, value in zip(names, evaluation.stats, strict=False) if value >= 0}


def _xywh(box: Box) -> list[float]:
    return [box.x1, box.y1, box.x2 - box.x1, box.y2 - box.y1]


def average_precision(images: Sequence[Detections]) -> dict[str, float]:
    """COCO's AP (IoU 0.50 to 0.95), AP50 and AP75 of labelled boxes.

    Args:
        images: Predicted and gold boxes per image, in pixels.
    Returns:
        ``ap``, ``ap50``, ``ap75`` in [0, 1]; empty without pycocotools or without gold boxes.
    Source: cocodataset.org, detection evaluation.
    """
    if find_coco() is None:
        return {}
    labels = sorted({normalize_label(label) for image in images for label, _ in image.golds})
    number = {label: index for index, label in enumerate(labels, 1)}
    gold: dict[str, Any] = {
        "info": {},
        "images": [{"id": index} for index in range(len(images))],
        "categories": [{"id": index, "name": label} for label, index in number.items()],
        "annotations": [],
    }
    found: list[dict[str, Any]] = []
    for index, image in enumerate(images):
        for label, box in image.golds:
            entry = {"image_id": index, "category_id": number[normalize_label(label)], "bbox": _xywh(box), "iscrowd": 0}
            gold["annotations"].append({**entry, "id": len(gold["annotations"]) + 1, "area": box.area})
        for label, box in image.predictions:
            if normalize_label(label) in number:  # a label that is nowhere in the gold data has no AP
                entry = {"image_id": index, "category_id": number[normalize_label(label)], "bbox": _xywh(box)}
                found.append({**entry, "score": 1.0})
    return _evaluate("bbox", gold, found)


def _flat(points: Mapping[str, Point]) -> list[float]:
    named = {normalize_label(name): point for name, point in points.items()}
    flat: list[float] = []
    for name in COCO_KEYPOINTS:
        point = named.get(normalize_label(name))
        flat += [point.x, point.y, 2] if point is not None else [0, 0, 0]
    return flat


def keypoint_precision(people: Sequence[Person]) -> dict[str, float]:
    """COCO's AP of key points (OKS 0.50 to 0.95), AP50 and AP75, one person per question.

    Args:
        people: Per person: predicted points, gold points (COCO's names), gold box, gold area.
    Returns:
        As ``average_precision``.
    Source: cocodataset.org, keypoints evaluation.
    """
    if find_coco() is None:
        return {}
    gold: dict[str, Any] = {"info": {}, "images": [], "categories": [{"id": 1, "name": "person"}], "annotations": []}
    found: list[dict[str, Any]] = []
    for index, (points, truth, box, area) in enumerate(people):
        flat = _flat(truth)
        gold["images"].append({"id": index})
        entry = {"image_id": index, "category_id": 1}
        gold["annotations"].append(
            {
                **entry,
                "id": index + 1,
                "bbox": _xywh(box),
                "area": area,
                "iscrowd": 0,
                "keypoints": flat,
                "num_keypoints": sum(flag > 0 for flag in flat[2::3]),
            }
        )
        if points:
            found.append({**entry, "keypoints": _flat(points), "score": 1.0})
    return _evaluate("keypoints", gold, found)


def is_results(path: str | Path) -> bool:
    """Whether a file of predictions is COCO's list of results: objects with a ``bbox``.

    Raises:
        DataError: The file cannot be read.
    """
    if is_json_lines(path):
        return False
    first = next(iter_json(path), None)
    return first is not None and first.key is None and isinstance(first.value, dict) and "bbox" in first.value


GOLD_FIELDS = {
    "images": ("id",),
    "categories": ("id",),
    "annotations": ("id", "image_id", "category_id", "bbox", "area"),
}


def _id(value: Any) -> Any:
    """An id that can be looked up; None for what is neither a number nor a text."""
    return value if isinstance(value, (int, str)) else None


def _checked(gold: Any, where: str) -> dict[str, Any]:
    """COCO's gold data with every field that its evaluation reads."""
    if not isinstance(gold, dict) or not all(isinstance(gold.get(part), list) for part in GOLD_FIELDS):
        raise DataError(f"{where}: expected COCO's object of {', '.join(GOLD_FIELDS)}")
    for part, fields in GOLD_FIELDS.items():
        for each in gold[part]:
            bad = [name for name in fields if not isinstance(each, dict) or not _is_good(name, each.get(name))]
            if bad:
                raise DataError(f"{where}: {part}: {bad[0]!r} is missing or wrong in {each!r:.80}")
    if any("not_exhaustive_category_ids" in each for each in gold["images"]):
        raise DataError(f"{where}: LVIS's results are scored by its own evaluation (the package lvis)")
    marked = [{**each, "iscrowd": int(each.get("iscrowd") in (1, "1"))} for each in gold["annotations"]]
    return {"info": {}, **gold, "annotations": marked}


def _is_good(name: str, value: Any) -> bool:
    if name == "bbox":
        return isinstance(value, list) and len(value) == 4 and all(map(is_finite_number, value))
    return is_finite_number(value) if name == "area" else _id(value) is not None


def score_results(annotations: str | Path, results: str | Path) -> tuple[int, MetricResult]:
    """COCO's twelve numbers for a file of scored boxes, with crowds, sizes and the scores' order.

    Args:
        annotations: COCO's instances_val2017.json or a file in its format.
        results: A JSON list of {"image_id", "category_id", "bbox": [x, y, width, height], "score"}.
    Returns:
        (number of images, result); sizes without a gold box are left out.
    Raises:
        DataError: pycocotools is not installed, a file is not what it should be, or a result names an unknown image;
            names file and line.
    Source: cocodataset.org, detection evaluation and results format.
    """
    if find_coco() is None:
        raise DataError("COCO's results need pycocotools: pip install sphinxkit[eval]")
    try:
        gold = json.loads(Path(annotations).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{annotations}: cannot be read: {error}") from error
    gold = _checked(gold, str(annotations))
    images, categories = ({each["id"] for each in gold[part]} for part in ("images", "categories"))
    found = []
    for item in iter_json(results):
        value, where = item.value, f"{results}:{item.line}"
        if not isinstance(value, dict) or not value.keys() >= set(RESULT_FIELDS):
            raise DataError(f"{where}: a result must have {', '.join(RESULT_FIELDS)}, got {value!r:.80}")
        numbers = [*(value["bbox"] if isinstance(value["bbox"], list) else []), value["score"]]
        if len(numbers) != 5 or not all(map(is_finite_number, numbers)):
            raise DataError(f"{where}: expected a bbox of four numbers and a score, got {value!r:.80}")
        if _id(value["image_id"]) not in images or _id(value["category_id"]) not in categories:
            raise DataError(f"{where}: image_id or category_id is not in {annotations}, got {value!r:.80}")
        found.append({field: value[field] for field in RESULT_FIELDS})
    scores = _evaluate("bbox", gold, found, NAMES)
    return len(images), MetricResult(scores, notes=() if scores else ("there are no gold boxes",))
