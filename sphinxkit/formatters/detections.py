"""Answers with boxes as ``supervision``'s detections."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from sphinxkit.errors import DataError
from sphinxkit.formatters.tasks.base import labelled_boxes


def to_detections(items: Iterable[Any]) -> Any:
    """Boxes as ``supervision.Detections``, for its annotators, trackers and metrics.

    Args:
        items: What a parser gives (``model.ask(...).items``, ``ParseResult.items``): boxes and phrases with boxes, in
            pixels; words, points and key points have no box and are left out.
    Returns:
        ``xyxy`` (N, 4) in pixels, ``class_id`` (N,) by the labels' first place, and the labels in
        ``data["class_name"]``; no ``confidence``, as answers carry no scores.
    Raises:
        DataError: supervision is not installed.
    """
    try:
        supervision: Any = importlib.import_module("supervision")
    except ImportError as error:
        raise DataError("to_detections needs supervision: pip install sphinxkit[supervision]") from error
    found = labelled_boxes(items)
    if not found:
        return supervision.Detections.empty()
    number = {label: index for index, label in enumerate(dict.fromkeys(label for label, _ in found))}
    return supervision.Detections(
        xyxy=np.array([(box.x1, box.y1, box.x2, box.y2) for _, box in found], dtype=np.float32),
        class_id=np.array([number[label] for label, _ in found]),
        data={"class_name": np.array([label for label, _ in found])},
    )
