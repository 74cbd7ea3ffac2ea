"""Rewards for reinforcement learning of grounding: functions that TRL's GRPOTrainer takes as ``reward_funcs``.

Each is ``reward(completions, **columns) -> list[float]`` with one value in [0, 1] a completion. Completions are texts
or conversations (a list of messages, the last one counts). Columns are lists with one entry a completion; TRL passes
the data set's columns so. Gold boxes and points are in pixels of the image, whose size is in the columns ``width`` and
``height``, or that of the pictures in ``image``. Answers are read with the tasks' tolerant parsers.

Nothing here imports TRL. For another model's boxes, wrap a reward::

    def qwen_iou(completions, **columns):
        return iou_reward(completions, box_format="qwen2_5_vl", **columns)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sphinxkit.errors import DataError
from sphinxkit.evaluation.regions import match_boxes, oks
from sphinxkit.formatters import tasks
from sphinxkit.formatters.tasks.base import Keypoints, ParseResult, labelled_boxes
from sphinxkit.geometry import Box, ImageGeometry, Point

REPAIRED_FORMAT = 0.5  # our choice: between an answer of the right form and one that cannot be read


def _text(completion: Any) -> str:
    """The text of a completion: itself, or the content of its last message."""
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Sequence) and completion and isinstance(completion[-1], Mapping):
        content = completion[-1].get("content")
        if isinstance(content, str):
            return content
        if isinstance(content, Sequence):
            return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    raise DataError(f"rewards: a completion must be a text or a list of messages, got {completion!r:.80}")


def _column(columns: Mapping[str, Any], name: str, count: int) -> Sequence[Any]:
    values = columns.get(name)
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
        raise DataError(f"rewards: the column {name!r} must have one value for each of {count} completions")
    return values


def _geometries(columns: Mapping[str, Any], count: int) -> list[ImageGeometry]:
    if "width" in columns or "image" not in columns:
        sizes = list(zip(*(_column(columns, name, count) for name in ("width", "height")), strict=True))
    else:
        sizes = [picture.size for picture in _column(columns, "image", count)]
    return [ImageGeometry(int(width), int(height)) for width, height in sizes]


def _numbers(value: Any, count: int) -> list[float]:
    try:
        numbers = [float(number) for number in value]
    except (TypeError, ValueError) as error:
        raise DataError(f"rewards: expected {count} numbers, got {value!r:.80}") from error
    if len(numbers) != count:
        raise DataError(f"rewards: expected {count} numbers, got {value!r:.80}")
    return numbers


def _parse(task: str, text: str, geometry: ImageGeometry, box_format: str | None) -> ParseResult[Any]:
    if box_format is not None:
        return tasks.read_boxes_of(box_format, text, geometry)
    return tasks.create(task).parse(text, geometry)


def iou_reward(completions: Sequence[Any], *, box_format: str | None = None, **columns: Any) -> list[float]:
    """IoU of the answer's first box with the gold one; 0 where the answer has none.

    Args:
        completions: Answers of the task ``rec``.
        box_format: Another model's format; see ``tasks.BOX_FORMATS``.
        columns: ``box``: [x1, y1, x2, y2]; and the images' sizes.
    Raises:
        DataError: A column is missing or is not what it should be.
    """
    golds, geometries = _column(columns, "box", len(completions)), _geometries(columns, len(completions))
    rewards = []
    for completion, gold, geometry in zip(completions, golds, geometries, strict=True):
        boxes = labelled_boxes(_parse("rec", _text(completion), geometry, box_format).items)
        rewards.append(boxes[0][1].iou(Box(*_numbers(gold, 4))) if boxes else 0.0)
    return rewards


def boxes_reward(completions: Sequence[Any], *, box_format: str | None = None, **columns: Any) -> list[float]:
    """F1 of several boxes, where a matched pair counts its IoU: 2 * sum of IoU / (boxes found + gold boxes).

    Boxes are matched one to one, the largest overlap first, if their labels agree. An answer without boxes is right, 1,
    where there is no gold box.

    Args:
        completions: Answers of the task ``detection``, or another whose answer is phrases with boxes.
        box_format: Another model's format; see ``tasks.BOX_FORMATS``.
        columns: ``boxes``: a list of [x1, y1, x2, y2]; ``labels``: as many texts, or absent where labels play no part;
            and the images' sizes.
    Raises:
        DataError: A column is missing or is not what it should be.
    """
    count = len(completions)
    golds, geometries = _column(columns, "boxes", count), _geometries(columns, count)
    labels = _column(columns, "labels", count) if "labels" in columns else [None] * count
    rewards = []
    for completion, boxes, names, geometry in zip(completions, golds, labels, geometries, strict=True):
        gold = [Box(*_numbers(box, 4)) for box in boxes]
        if names is not None and len(names) != len(gold):
            raise DataError(f"rewards: {len(gold)} boxes but {len(names)} labels")
        found = labelled_boxes(_parse("detection", _text(completion), geometry, box_format).items)
        wanted = list(zip(names or [""] * len(gold), gold, strict=True))
        found = found if names is not None else [("", box) for _, box in found]
        overlap = sum(found[i][1].iou(gold[j]) for i, j in match_boxes(found, wanted, iou=0.0))
        total = len(found) + len(gold)
        rewards.append(2 * overlap / total if total else 1.0)
    return rewards


def keypoints_reward(completions: Sequence[Any], **columns: Any) -> list[float]:
    """Object key-point similarity (OKS) of the answer's person with the gold one; 0 where it has no points.

    Args:
        completions: Answers of the task ``pose``.
        columns: ``keypoints``: {COCO's name: [x, y]}, None or absent for those that cannot be seen; ``area`` of the
            person in square pixels; and the images' sizes.
    Raises:
        DataError: A column is missing or is not what it should be.
    Source: cocodataset.org, keypoints evaluation.
    """
    count = len(completions)
    golds, areas = (_column(columns, name, count) for name in ("keypoints", "area"))
    rewards = []
    for completion, named, area, geometry in zip(completions, golds, areas, _geometries(columns, count), strict=True):
        if not isinstance(named, Mapping):
            raise DataError(f"rewards: key points must be {{name: [x, y]}}, got {named!r:.80}")
        gold = {str(name): Point(*_numbers(point, 2)) for name, point in named.items() if point is not None}
        items = tasks.create("pose").parse(_text(completion), geometry).items
        found = next((item.points for item in items if isinstance(item, Keypoints)), {})
        rewards.append(oks(found, gold, float(area)) if found and gold else 0.0)
    return rewards


def format_reward(
    completions: Sequence[Any], *, task: str | Sequence[str] = "rec", box_format: str | None = None, **columns: Any
) -> list[float]:
    """1 for an answer that the parser reads without any repair, 0.5 for one that it repairs, 0 for any other.

    Args:
        completions: Answers.
        task: The task that they answer, or a column of tasks.
        box_format: Another model's format; see ``tasks.BOX_FORMATS``.
        columns: The images' sizes.
    Raises:
        DataError: A column is missing or is not what it should be.
    """
    count = len(completions)
    names = [task] * count if isinstance(task, str) else _column({"task": task}, "task", count)
    rewards = []
    for completion, name, geometry in zip(completions, names, _geometries(columns, count), strict=True):
        result = _parse(name, _text(completion), geometry, box_format)
        is_read = bool(result.items) and not result.failures
        rewards.append(1.0 if result.is_strict else REPAIRED_FORMAT if is_read else 0.0)
    return rewards
