"""Boxes as other models write them, read into pixels of the image.

The format is chosen by name. It is never guessed: the numbers of one format are often valid in another.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sphinxkit.errors import DataError
from sphinxkit.formatters.tasks.base import ErrorLog, GroundedPhrase, ParseResult
from sphinxkit.formatters.tasks.coordinates import NUMBER
from sphinxkit.geometry import Box, ImageGeometry
from sphinxkit.registry import suggest

_LIST = r"\[(?P<box>[^\[\]]*)\]"
_OBJECT = re.compile(r"\{[^{}]*\}")
_FENCE = re.compile(r"\A\s*```(?:json)?\s*|\s*```\s*\Z")
_BETWEEN = re.compile(r"[\s,;()\[\]]*")


@dataclass(frozen=True, slots=True)
class BoxFormat:
    """How a model writes boxes.

    Args:
        source: Whose format it is and where it is defined.
        pattern: Finds ``box``, the place of its numbers, and ``label``, which holds for the boxes that follow it.
        key: Field of the box in JSON objects, in place of ``pattern``; the label is in ``label``.
        scale: The number that stands for the image's whole width or height; None: numbers are pixels.
        order: The order of a box's four numbers.
    """

    source: str
    pattern: str = ""
    key: str = ""
    scale: float | None = 1000.0
    order: str = "xyxy"


def _tags(label: tuple[str, str], box: tuple[str, str]) -> str:
    (label_open, label_close), (box_open, box_close) = (tuple(map(re.escape, pair)) for pair in (label, box))
    return f"{label_open}(?P<label>[^<]*){label_close}|{box_open}(?P<box>[^<]*){box_close}"


_BOX_TAGS = _tags(("<ref>", "</ref>"), ("<box>", "</box>"))
_TOKEN_TAGS = _tags(("<|object_ref_start|>", "<|object_ref_end|>"), ("<|box_start|>", "<|box_end|>"))

BOX_FORMATS: dict[str, BoxFormat] = {
    "pixels": BoxFormat("[x1, y1, x2, y2] in pixels of the original image", _LIST, scale=None),
    "xyxy_1000": BoxFormat("[x1, y1, x2, y2] in thousandths of width and height", _LIST),
    "yxyx_1000": BoxFormat("[y1, x1, y2, x2] in thousandths of height and width", _LIST, order="yxyx"),
    "qwen_vl": BoxFormat("<box>(x1,y1),(x2,y2)</box>; Qwen-VL, eval_mm/evaluate_grounding.py", _BOX_TAGS, scale=999.0),
    "internvl": BoxFormat("<box>[[x1, y1, x2, y2]]</box>; InternVL, eval/refcoco/evaluate_grounding.py", _BOX_TAGS),
    "qwen2_vl": BoxFormat("<|box_start|>(x1,y1),(x2,y2)<|box_end|>; Qwen2-VL, arXiv:2409.12191", _TOKEN_TAGS),
    "qwen2_5_vl": BoxFormat('JSON "bbox_2d" in pixels; Qwen2.5-VL, arXiv:2502.13923', key="bbox_2d", scale=None),
    "qwen3_vl": BoxFormat('JSON "bbox_2d" in thousandths; Qwen3-VL, cookbooks/2d_grounding', key="bbox_2d"),
    "gemini": BoxFormat('JSON "box_2d", [y1, x1, y2, x2] in thousandths; Gemini API', key="box_2d", order="yxyx"),
}
"""Every format by name."""


def read_boxes_of(name: str, text: str, geometry: ImageGeometry, label: str = "") -> ParseResult[GroundedPhrase]:
    """Read another model's answer as labelled boxes.

    Boxes are not clipped to the image. A box that cannot be read is left out and is an error of the result.

    Args:
        name: A key of ``BOX_FORMATS``.
        text: The answer.
        geometry: The image's size. Qwen2.5-VL means the pixels of the image that it was given: if that was resized,
            this is the resized size.
        label: The label of boxes without one of their own.
    Raises:
        DataError: There is no such format.
    """
    if name not in BOX_FORMATS:
        hint = suggest(name, BOX_FORMATS) or "."
        raise DataError(f"unknown box format {name!r}{hint} Known: {', '.join(BOX_FORMATS)}")
    box_format, log = BOX_FORMATS[name], ErrorLog(text)
    read = _read_json if box_format.key else _read_marked
    items = tuple(
        GroundedPhrase(found.strip() or label, (box,))
        for found, box in read(box_format, log, geometry)
        if not log.is_full
    )
    if not items and not log.errors:
        log.add("no_coordinates", 0, len(text), is_repaired=False)
    return ParseResult(items, tuple(log.errors), text.strip())


def _read_marked(box_format: BoxFormat, log: ErrorLog, geometry: ImageGeometry) -> Iterator[tuple[str, Box]]:
    label = ""
    for match in re.finditer(box_format.pattern, log.text):
        inside = match.group("box")
        if inside is None:
            label = match.group("label")
            continue
        numbers = [float(found.group()) for found in NUMBER.finditer(inside)]
        if not _BETWEEN.fullmatch(NUMBER.sub("", inside)):
            log.add("not_a_number", *match.span(), is_repaired=False)
        elif not numbers or len(numbers) % 4:
            log.add("wrong_count", *match.span(), is_repaired=False)
        else:
            for start in range(0, len(numbers), 4):
                yield from _box(box_format, numbers[start : start + 4], label, match.span(), log, geometry)


def _read_json(box_format: BoxFormat, log: ErrorLog, geometry: ImageGeometry) -> Iterator[tuple[str, Box]]:
    text = log.text
    if _load(_FENCE.sub("", text)) is None:
        log.add("wording", 0, len(text), is_repaired=True)  # words around it, or cut off
    for match in _OBJECT.finditer(text):
        record = _load(match.group())
        numbers = _floats(record.get(box_format.key)) if isinstance(record, dict) else []
        if len(numbers) != 4:
            log.add("wrong_count", *match.span(), is_repaired=False)
            continue
        label = record.get("label", "")
        yield from _box(box_format, numbers, label if isinstance(label, str) else "", match.span(), log, geometry)


def _floats(values: Any) -> list[float]:
    """The numbers of a JSON list; none if it is something else."""
    is_list = isinstance(values, list) and all(type(value) in (int, float) for value in values)
    try:
        return [float(value) for value in values] if is_list else []
    except OverflowError:
        return []


def _load(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _box(
    box_format: BoxFormat,
    numbers: list[float],
    label: str,
    span: tuple[int, int],
    log: ErrorLog,
    geometry: ImageGeometry,
) -> Iterator[tuple[str, Box]]:
    """The box of four numbers, or none and an error."""
    x1, y1, x2, y2 = numbers if box_format.order == "xyxy" else (numbers[index] for index in (1, 0, 3, 2))
    width, height = (
        (1.0, 1.0)
        if box_format.scale is None
        else (
            geometry.width / box_format.scale,
            geometry.height / box_format.scale,
        )
    )
    corners = (x1 * width, y1 * height, x2 * width, y2 * height)
    if not all(map(math.isfinite, corners)):
        log.add("not_a_number", *span, is_repaired=False)
    elif x1 > x2 or y1 > y2:
        log.add("swapped_corners", *span, is_repaired=False)
    else:
        yield label, Box(*corners)
