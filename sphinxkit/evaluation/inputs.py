"""Reads unified annotations, and predictions in three formats."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sphinxkit.data.json_stream import (
    JsonItem,
    is_finite_number,
    is_json_lines,
    iter_json,
    iter_json_lines,
    iter_json_members,
)
from sphinxkit.errors import DataError
from sphinxkit.geometry import ImageGeometry

_SIZE = re.compile(r"height(\d+)_?width(\d+)|width(\d+)_?height(\d+)")


@dataclass(frozen=True, slots=True)
class Annotation:
    """One question with its gold answer.

    Args:
        question_id: The benchmark's id; not always unique.
        image_path: The image's path in the file.
        question: The question in the file.
        gold: ``gt_answers``: a string, a list of strings, a box, or what the task's metric takes.
        where: "file:line", for messages.
        size: (width, height) of the image in pixels where the file tells, by ``width`` and ``height`` or within
            ``question_id`` ("height480_width640").
        fields: The whole record.
    """

    question_id: str | int
    image_path: str
    question: str
    gold: Any
    where: str
    size: tuple[int, int] | None
    fields: dict[str, Any]

    @property
    def geometry(self) -> ImageGeometry:
        """The image's geometry.

        Raises:
            DataError: The record does not tell the size, or one that no image has.
        """
        if self.size is None:
            raise DataError(
                f"{self.where}: the image size is needed: 'width' and 'height', or a question_id such as "
                "height480_width640"
            )
        if not all(is_finite_number(side) and side > 0 for side in self.size):
            raise DataError(f"{self.where}: width and height must be positive, got {self.size!r:.80}")
        return ImageGeometry(*self.size)


@dataclass(frozen=True, slots=True)
class Record:
    """One annotation with the answer to be scored."""

    annotation: Annotation
    prediction: str


@dataclass(frozen=True, slots=True)
class Predictions:
    """The answers in the annotations' order, and the manifest: an object's own, or the file beside JSON lines."""

    answers: list[str]
    manifest: dict[str, Any]


def _size(record: dict[str, Any]) -> tuple[int, int] | None:
    width, height = record.get("width"), record.get("height")
    if isinstance(width, int) and isinstance(height, int):
        return width, height
    found = _SIZE.search(str(record.get("question_id", "")))
    if not found:
        return None
    height_first, width_second, width_first, height_second = found.groups()
    return int(width_second or width_first), int(height_first or height_second)


def _annotation_items(path: str | Path) -> Iterator[JsonItem]:
    if is_json_lines(path):
        yield from iter_json_lines(path)
        return
    is_object = False
    for item in iter_json(path):
        if item.key == "annotations":
            yield from (inner for _, inner in iter_json_members(path, ["annotations"]))
            return
        is_object = item.key is not None
        if not is_object:
            yield item
    if is_object:
        raise DataError(f"{path}: expected a list of annotations, or an object with 'annotations'")


def read_annotations(path: str | Path) -> list[Annotation]:
    """The unified annotations, or the VQA challenge's own.

    Unified: a JSON list (or JSON lines) of ``{image_path, question, question_id, gt_answers, ...}``. The VQA
    challenge's: an object whose ``annotations`` have ``question_id`` and ten ``answers``.

    Args:
        path: The file.
    Raises:
        DataError: It cannot be read, is empty, or a record lacks ``gt_answers``; names file and line.
    """
    annotations: list[Annotation] = []
    for item in _annotation_items(path):
        record, where = item.value, f"{path}:{item.line}"
        if not isinstance(record, dict):
            raise DataError(f"{where}: an annotation must be an object, got {type(record).__name__}")
        gold = record.get("gt_answers", record.get("answers"))
        if gold is None:
            raise DataError(f"{where}: the annotation has no 'gt_answers'; its keys: {', '.join(sorted(record))}")
        question_id = record.get("question_id", len(annotations))
        if not isinstance(question_id, (str, int)):
            raise DataError(f"{where}: question_id must be a string or an integer, got {question_id!r}")
        image, question = str(record.get("image_path", "")), str(record.get("question", ""))
        annotations.append(Annotation(question_id, image, question, gold, where, _size(record), record))
    if not annotations:
        raise DataError(f"{path}: no annotations")
    return annotations


def _answer(path: str | Path, item: JsonItem) -> tuple[str | None, str]:
    """(question_id or None, answer) of a string or of {question_id, answer}."""
    value = item.value
    if isinstance(value, str):
        return None, value
    if not isinstance(value, dict):
        raise DataError(f"{path}:{item.line}: a prediction must be a string or an object, got {type(value).__name__}")
    missing = [key for key in ("question_id", "answer") if key not in value]
    if missing:
        raise DataError(f"{path}:{item.line}: the prediction has no {' and no '.join(map(repr, missing))}")
    if not isinstance(value["answer"], str):
        raise DataError(f"{path}:{item.line}: answer must be a string, got {type(value['answer']).__name__}")
    return str(value["question_id"]), value["answer"]


def manifest_path(predictions: str | Path) -> Path:
    """Where JSON lines of predictions have their manifest: ``<predictions>.manifest.json``."""
    return Path(f"{predictions}.manifest.json")


def _read_manifest(path: Path) -> dict[str, Any]:
    return {str(item.key): item.value for item in iter_json(path)} if path.exists() else {}


def _read_items(path: str | Path) -> tuple[list[JsonItem], dict[str, Any]]:
    """(every prediction, the manifest of the file)."""
    if is_json_lines(path):
        return list(iter_json_lines(path)), _read_manifest(manifest_path(path))
    members = {item.key: item.value for item in iter_json(path)}
    if not members or None in members:
        return list(iter_json(path)), {}
    if "predictions" in members:
        if not isinstance(members["predictions"], list):
            raise DataError(f"{path}: 'predictions' must be a list, got {type(members['predictions']).__name__}")
        manifest = members.get("manifest", {})
        items = [item for _, item in iter_json_members(path, ["predictions"])]
        return items, manifest if isinstance(manifest, dict) else {}
    if {"question_id", "answer"} <= members.keys():
        return [JsonItem(1, None, members)], {}
    raise DataError(
        f"{path}: expected a list of strings, an object with 'predictions', or JSON lines of {{question_id, answer}}; "
        f"got an object with the keys {', '.join(sorted(map(str, members)))}"
    )


def _by_question_id(
    path: str | Path, given: Sequence[tuple[int, str, str]], annotations: Sequence[Annotation]
) -> list[str]:
    """Answers in the annotations' order, by their ids; ``given`` holds (line, question_id, answer)."""
    wanted = [str(annotation.question_id) for annotation in annotations]
    if len(set(wanted)) < len(wanted):
        # Ids that repeat (ChartQA's are all -1) cannot tell the answers apart: only the same order can.
        for (line, question_id, _), expected in zip(given, wanted, strict=False):
            if question_id != expected:
                raise DataError(
                    f"{path}:{line}: question_id {question_id!r} where the annotations have {expected!r}; the "
                    "benchmark's ids are not unique, so predictions must be in the annotations' order"
                )
        _check_count(path, len(given), len(wanted))
        return [answer for _, _, answer in given]
    known = set(wanted)
    answers: dict[str, str] = {}
    lines: dict[str, int] = {}
    for line, question_id, answer in given:
        if question_id not in known:
            raise DataError(f"{path}:{line}: question_id {question_id!r} is not in the annotations")
        if question_id in answers:
            raise DataError(
                f"{path}:{line}: question_id {question_id!r} is there twice, first on line {lines[question_id]}"
            )
        answers[question_id], lines[question_id] = answer, line
    missing = [annotation for annotation in annotations if str(annotation.question_id) not in answers]
    if missing:
        raise DataError(
            f"{path}: no prediction for {len(missing)} of {len(wanted)} questions, the first is question_id "
            f"{missing[0].question_id!r} ({missing[0].where})"
        )
    return [answers[question_id] for question_id in wanted]


def _check_count(path: str | Path, got: int, expected: int) -> None:
    if got != expected:
        raise DataError(f"{path}: {got} predictions for {expected} annotations")


def read_predictions(path: str | Path, annotations: Sequence[Annotation]) -> Predictions:
    """Read predictions in any of the three formats.

    A JSON list of strings, an object with a ``predictions`` list, or JSON lines of ``{question_id, answer}``. Strings
    are in the annotations' order. Objects are matched by ``question_id``; where the benchmark's ids are not unique,
    they must be in the annotations' order as well.

    Args:
        path: The file.
        annotations: The annotations that they answer.
    Raises:
        DataError: Unreadable, a wrong count, an unknown, missing or duplicate ``question_id``; names file and line.
    """
    items, manifest = _read_items(path)
    parsed = [(item.line, *_answer(path, item)) for item in items]
    kinds = Counter(question_id is None for _, question_id, _ in parsed)
    if len(kinds) > 1:
        raise DataError(
            f"{path}: {kinds[True]} predictions are strings and {kinds[False]} are objects; expected one kind"
        )
    if kinds[True]:
        _check_count(path, len(parsed), len(annotations))
        return Predictions([answer for _, _, answer in parsed], manifest)
    given = [(line, question_id, answer) for line, question_id, answer in parsed if question_id is not None]
    if not given:
        _check_count(path, 0, len(annotations))
    return Predictions(_by_question_id(path, given, annotations), manifest)
