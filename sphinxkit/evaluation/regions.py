"""Scores of boxes, labelled boxes and key points, all in one frame of the caller's choice (usually original pixels)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sphinxkit.formatters.tasks import COCO_KEYPOINTS
from sphinxkit.geometry import Box, ImageGeometry, Point

IOU_THRESHOLD = 0.5  # PASCAL VOC's; RefCOCO's precision@1
PCK_FRACTION = 0.1  # of the person's longer side; Yang and Ramanan, TPAMI 2013, section 5

# Standard deviations of people's clicks per key point, in COCO's order, over the square root of the person's area.
# Source: cocodataset.org, keypoints evaluation.
OKS_SIGMAS = (
    *(0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072),
    *(0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089, 0.089),
)

_BRACKET = re.compile(r"\[(.*?)\]")

LabelledBox = tuple[str, Box]
Corners = tuple[float, float, float, float]


def normalize_label(text: str) -> str:
    """A label as it is compared: lower case, underscores as spaces, single spaces, no full stop at the end."""
    return " ".join(text.lower().replace("_", " ").split()).rstrip(".")


def read_box_strictly(text: str) -> Corners | None:
    """The first ``[...]`` of an answer as exactly four comma-separated finite floats, with no repair.

    Without any ``[...]`` the text up to the first ']' is tried.

    Args:
        text: An answer.
    Returns:
        (x1, y1, x2, y2) as written (fractions of the padded square; the corners may be swapped), or None.
    Source: LLaMA2-Accessory, accessory/eval_mm/evaluate.py, the RefCOCO metric.
    """
    found = _BRACKET.search(text)
    parts = (found.group(1) if found else text.split("]", 1)[0]).split(",")
    if len(parts) != 4:
        return None
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        return None
    x1, y1, x2, y2 = numbers
    return (x1, y1, x2, y2) if all(map(math.isfinite, numbers)) else None


def square_iou(prediction: Corners | None, gold: Box, geometry: ImageGeometry) -> float:
    """IoU of a predicted box (fractions of the padded square) and a gold one (original pixels), in the padded square.

    Nothing is clipped or repaired; a missing prediction and one with swapped corners overlap nothing.

    Args:
        prediction: (x1, y1, x2, y2) in fractions of the padded square's side, or None.
        gold: Original pixels.
        geometry: The image's size.
    """
    if prediction is None or prediction[0] > prediction[2] or prediction[1] > prediction[3]:
        return 0.0
    side, (dx, dy) = geometry.side, geometry.offset
    x1, y1, x2, y2 = prediction
    predicted = Box(x1 * side, y1 * side, x2 * side, y2 * side)
    return predicted.iou(Box(gold.x1 + dx, gold.y1 + dy, gold.x2 + dx, gold.y2 + dy))


def match_boxes(
    predictions: Sequence[LabelledBox], golds: Sequence[LabelledBox], iou: float = IOU_THRESHOLD
) -> list[tuple[int, int]]:
    """One-to-one pairs of equal labels with at least ``iou`` overlap, the largest overlap first.

    Args:
        predictions: Labelled boxes of one image.
        golds: Labelled gold boxes of the same image.
        iou: Smallest overlap of a pair.
    Returns:
        (index of prediction, index of gold) pairs.
    """
    labels = [normalize_label(label) for label, _ in golds]
    candidates = []
    for i, (label, box) in enumerate(predictions):
        wanted = normalize_label(label)
        for j, (_, gold) in enumerate(golds):
            if labels[j] == wanted and (overlap := box.iou(gold)) >= iou:
                candidates.append((-overlap, i, j))
    pairs: list[tuple[int, int]] = []
    used_predictions: set[int] = set()
    used_golds: set[int] = set()
    for _, i, j in sorted(candidates):
        if i not in used_predictions and j not in used_golds:
            pairs.append((i, j))
            used_predictions.add(i)
            used_golds.add(j)
    return pairs


@dataclass(slots=True)
class MatchCounts:
    """Counts of matched, predicted and gold items over a data set, and per label."""

    matched: int = 0
    predicted: int = 0
    gold: int = 0
    labels: dict[str, MatchCounts] = field(default_factory=dict)

    def add(self, predictions: Sequence[LabelledBox], golds: Sequence[LabelledBox], iou: float = IOU_THRESHOLD) -> int:
        """Count one image; returns how many gold boxes were found."""
        pairs = match_boxes(predictions, golds, iou)
        for label, _ in predictions:
            self.labels.setdefault(normalize_label(label), MatchCounts()).predicted += 1
        for label, _ in golds:
            self.labels.setdefault(normalize_label(label), MatchCounts()).gold += 1
        for _, j in pairs:
            self.labels[normalize_label(golds[j][0])].matched += 1
        self.matched += len(pairs)
        self.predicted += len(predictions)
        self.gold += len(golds)
        return len(pairs)

    @property
    def precision(self) -> float:
        """Matched over predicted; 1 where nothing was predicted and nothing was there."""
        return self.matched / self.predicted if self.predicted else float(self.gold == 0)

    @property
    def recall(self) -> float:
        """Matched over gold; 1 where nothing was there."""
        return self.matched / self.gold if self.gold else 1.0

    @property
    def f1(self) -> float:
        """2 matched / (predicted + gold); 1 where both are empty."""
        return 2 * self.matched / (self.predicted + self.gold) if self.predicted + self.gold else 1.0


def pck(
    prediction: Mapping[str, Point], gold: Mapping[str, Point], box: Box, fraction: float = PCK_FRACTION
) -> tuple[int, int]:
    """Correct key points: those within ``fraction`` of the person's longer side of their gold place.

    Args:
        prediction: Points by name; a name that is missing is wrong.
        gold: The points that are annotated.
        box: The person's box.
        fraction: Radius as a fraction of max(width, height) of ``box``.
    Returns:
        (correct, annotated).
    Source: Yang and Ramanan, TPAMI 2013, section 5 (PCK).
    """
    reach = fraction * max(box.x2 - box.x1, box.y2 - box.y1)
    names = {normalize_label(name): point for name, point in prediction.items()}
    correct = 0
    for name, point in gold.items():
        guess = names.get(normalize_label(name))
        correct += guess is not None and math.hypot(guess.x - point.x, guess.y - point.y) <= reach
    return correct, len(gold)


def oks(prediction: Mapping[str, Point], gold: Mapping[str, Point], area: float) -> float:
    """Object key-point similarity of one person.

    The mean over annotated points of exp(-d^2 / (2 s^2 k^2)) with k = 2 sigma.

    Args:
        prediction: Points by COCO name; a name that is missing counts 0.
        gold: The points that are annotated.
        area: The person's area s^2 in the points' unit squared.
    Returns:
        Similarity in [0, 1]; 0 without annotated points.
    Source: cocodataset.org, keypoints evaluation, section 1.2.
    """
    sigmas = {normalize_label(name): sigma for name, sigma in zip(COCO_KEYPOINTS, OKS_SIGMAS, strict=True)}
    names = {normalize_label(name): point for name, point in prediction.items()}
    total, count = 0.0, 0
    for name, point in gold.items():
        sigma = sigmas.get(normalize_label(name))
        if sigma is None:
            continue
        count += 1
        guess = names.get(normalize_label(name))
        if guess is not None and area > 0:
            squared = (guess.x - point.x) ** 2 + (guess.y - point.y) ** 2
            total += math.exp(-squared / (2 * area * (2 * sigma) ** 2))
    return total / count if count else 0.0
