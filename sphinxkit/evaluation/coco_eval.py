"""COCO's average precision through pycocotools, for answers that carry no scores.

Policy: every box or person of an answer has score 1 and ties keep the order of the file, so AP is that of one operating
point; F1 and PCK say more about a model that answers in words.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sphinxkit.evaluation.regions import LabelledBox, normalize_label
from sphinxkit.formatters.tasks import COCO_KEYPOINTS
from sphinxkit.geometry import Box, Point

Person = tuple[Mapping[str, Point], Mapping[str, Point], Box, float]
"""Predicted points, gold points, gold box, gold area."""


@dataclass(frozen=True, slots=True)
class Detections:
    """One image's predicted and gold boxes."""

    predictions: list[LabelledBox]
    golds: list[LabelledBox]


def has_pycocotools() -> bool:
    """Whether pycocotools is installed (``pip install sphinxkit[eval]``)."""
    return importlib.util.find_spec("pycocotools") is not None


def _evaluate(kind: str, gold: dict[str, Any], found: list[dict[str, Any]]) -> dict[str, float]:
    if not gold["annotations"]:
        return {}
    if not found:
        return {"ap": 0.0, "ap50": 0.0, "ap75": 0.0}
    coco: Any = importlib.import_module("pycocotools.coco")  # it has no types
    cocoeval: Any = importlib.import_module("pycocotools.cocoeval")

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it goes
        truth = coco.COCO()
        truth.dataset = gold
        truth.createIndex()
        evaluation = cocoeval.COCOeval(truth, truth.loadRes(found), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: float(value) for name, value in zip(("ap", "ap50", "ap75"), evaluation.stats, strict=False)}


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
    if not has_pycocotools():
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
    if not has_pycocotools():
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
