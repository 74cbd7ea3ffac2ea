"""Reads annotations and predictions: our unified files and the official ones of public benchmarks."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
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
from sphinxkit.evaluation.annotation import Annotation
from sphinxkit.evaluation.layouts import read_layout
from sphinxkit.formatters.tasks.multiple_choice import LETTERS

# Fields that name a question and that hold its answer, in official answer files and in LLaVA's; the first one counts.
ID_KEYS = ("question_id", "questionId", "image_id", "image", "index")
ANSWER_KEYS = ("answer", "prediction", "text", "caption")


@dataclass(frozen=True, slots=True)
class Predictions:
    """The answers in the annotations' order, and the manifest: an object's own, or the file beside JSON lines."""

    answers: list[str]
    manifest: dict[str, Any]


def _tsv(path: Path) -> list[JsonItem]:
    """The rows of a table of tab-separated values, by the names of its first row."""
    limit = csv.field_size_limit()
    try:
        csv.field_size_limit(max(limit, path.stat().st_size))  # a cell may hold a picture
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t", restval="")
            items, line = [], 2
            for row in reader:
                items.append(JsonItem(line, None, row))
                line = reader.line_num + 1
            return items
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a table of tab-separated values: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _annotation_items(path: Path) -> list[JsonItem]:
    """The records of a file: rows, lines, a list, the list ``annotations`` or ``data`` of an object, or its members."""
    if path.suffix == ".tsv":
        return _tsv(path)
    if is_json_lines(path):
        return list(iter_json_lines(path))
    items: list[JsonItem] = []
    for item in iter_json(path):
        if item.key in ("annotations", "data") and isinstance(item.value, list):
            return [inner for _, inner in iter_json_members(path, [item.key])]
        items.append(item)
    if any(item.key is not None and not isinstance(item.value, dict) for item in items):
        raise DataError(f"{path}: expected a list of annotations, or an object with 'annotations'")
    return items


def read_annotations(path: str | Path, split: str = "") -> list[Annotation]:
    """Annotations: unified ones, or the official file of a benchmark.

    Unified: a JSON list (or JSON lines) of ``{image_path, question, question_id, gt_answers, ...}``. Official: VQAv2,
    OK-VQA, TextVQA, VizWiz, DocVQA, InfographicVQA, ChartQA, GQA, OCR-VQA, ScienceQA, A-OKVQA, POPE, COCO's captions
    and instances, LVIS, TextCaps, MMBench's table. The fields of the first record tell which.

    Args:
        path: The file.
        split: Keep this split of a file that holds several (OCR-VQA, ScienceQA); "": keep all.
    Raises:
        DataError: It cannot be read, is empty, or a record lacks a field; names file and line.
    """
    found = list(read_layout(Path(path), _annotation_items(Path(path))))
    annotations = [each for each in found if not split or not each.split or each.split == split]
    if not annotations:
        raise DataError(f"{path}: no annotations{f' of split {split!r}' if found else ''}")
    return annotations


@dataclass(frozen=True, slots=True)
class _Given:
    """One prediction as the file has it: its line, the question's id or text where it tells, the answer."""

    line: int
    question_id: str | None
    question: str | None
    answer: str


def _given(path: str | Path, item: JsonItem) -> _Given:
    """A prediction: a text, a number, or an object with an answer and a question's id or its text."""
    value = item.value
    if isinstance(value, str) or is_finite_number(value):
        return _Given(item.line, None, None, str(value))
    if not isinstance(value, dict):
        raise DataError(f"{path}:{item.line}: a prediction must be a string or an object, got {type(value).__name__}")
    id_key = next((key for key in ID_KEYS if key in value), None)
    answer_key = next((key for key in ANSWER_KEYS if key in value), None)
    question = value.get("question")
    missing = ["'question_id'"] * (id_key is None and not isinstance(question, str)) + ["'answer'"] * (not answer_key)
    if missing:
        raise DataError(f"{path}:{item.line}: the prediction has no {' and no '.join(missing)}")
    answer = value[answer_key]
    if not isinstance(answer, str) and not is_finite_number(answer):
        raise DataError(f"{path}:{item.line}: {answer_key} must be a string, got {type(answer).__name__}")
    return _Given(
        item.line, None if id_key is None else str(value[id_key]), question if id_key is None else None, str(answer)
    )


def manifest_path(predictions: str | Path) -> Path:
    """Where JSON lines of predictions have their manifest: ``<predictions>.manifest.json``."""
    return Path(f"{predictions}.manifest.json")


def _read_manifest(path: Path) -> dict[str, Any]:
    return {str(item.key): item.value for item in iter_json(path)} if path.exists() else {}


def _read_items(path: str | Path, answer_key: str) -> tuple[list[JsonItem], dict[str, Any]]:
    """(every prediction, the manifest of the file)."""
    if Path(path).suffix == ".tsv":
        return _tsv(Path(path)), {}
    if is_json_lines(path):
        return list(iter_json_lines(path)), _read_manifest(manifest_path(path))
    items = list(iter_json(path))
    members = {item.key: item.value for item in items}
    if not members or None in members:
        return items, {}
    if "predictions" in members:
        if not isinstance(members["predictions"], list):
            raise DataError(f"{path}: 'predictions' must be a list, got {type(members['predictions']).__name__}")
        manifest = members.get("manifest", {})
        items = [item for _, item in iter_json_members(path, ["predictions"])]
        return items, manifest if isinstance(manifest, dict) else {}
    if {"question_id", "answer"} <= members.keys():
        return [JsonItem(1, None, members)], {}
    if isinstance(members.get("results"), dict):  # ScienceQA's: the index of a choice
        items = [JsonItem(1, key, _letter(index)) for key, index in members["results"].items()]
    answers = [_by_key(item, answer_key) for item in items]
    if None in answers:
        raise DataError(
            f"{path}: expected a list of strings, an object with 'predictions', an object {{question_id: answer}}, or "
            f"JSON lines of {{question_id, answer}}; got an object with the keys {', '.join(sorted(map(str, members)))}"
        )
    return [answer for answer in answers if answer is not None], {}


def _letter(index: Any) -> Any:
    is_index = isinstance(index, int) and not isinstance(index, bool)
    return (LETTERS[index] if 0 <= index < len(LETTERS) else "") if is_index else index


def _by_key(item: JsonItem, answer_key: str) -> JsonItem | None:
    """A member {question_id: answer}, or A-OKVQA's {question_id: {"multiple_choice": ..., "direct_answer": ...}}."""
    value = item.value
    if isinstance(value, dict):
        value = value.get(answer_key)
    is_answer = isinstance(value, str) or is_finite_number(value)
    return JsonItem(item.line, None, {"question_id": item.key, "answer": value}) if is_answer else None


def _by_question_id(path: str | Path, given: Sequence[_Given], annotations: Sequence[Annotation]) -> list[str]:
    """Answers in the annotations' order, by their ids."""
    wanted = [str(annotation.question_id) for annotation in annotations]
    if len(set(wanted)) < len(wanted):
        # Ids that repeat (ChartQA's are all -1) cannot tell the answers apart: only the same order can.
        for each, expected in zip(given, wanted, strict=False):
            if each.question_id != expected:
                raise DataError(
                    f"{path}:{each.line}: question_id {each.question_id!r:.80} where the annotations have "
                    f"{expected!r:.80}; the benchmark's ids are not unique, so predictions must be in the annotations' "
                    "order"
                )
        _check_count(path, len(given), len(wanted))
        return [each.answer for each in given]
    known = set(wanted)
    answers: dict[str, str] = {}
    lines: dict[str, int] = {}
    for each in given:
        line, question_id = each.line, str(each.question_id)
        if question_id not in known:
            raise DataError(f"{path}:{line}: question_id {question_id!r:.80} is not in the annotations")
        if question_id in answers:
            raise DataError(
                f"{path}:{line}: question_id {question_id!r:.80} is there twice, first on line {lines[question_id]}"
            )
        answers[question_id], lines[question_id] = each.answer, line
    missing = [annotation for annotation in annotations if str(annotation.question_id) not in answers]
    if missing:
        raise DataError(
            f"{path}: no prediction for {len(missing)} of {len(wanted)} questions, the first is question_id "
            f"{missing[0].question_id!r:.80} ({missing[0].where})"
        )
    return [answers[question_id] for question_id in wanted]


def _check_count(path: str | Path, got: int, expected: int) -> None:
    if got != expected:
        raise DataError(f"{path}: {got} predictions for {expected} annotations")


def _in_order(path: str | Path, given: Sequence[_Given], annotations: Sequence[Annotation]) -> list[str]:
    """Answers that stand in the annotations' order; a question's text, where it is given, has to agree."""
    _check_count(path, len(given), len(annotations))
    for each, annotation in zip(given, annotations, strict=True):
        if each.question is not None and each.question.strip() != annotation.question.strip():
            raise DataError(
                f"{path}:{each.line}: question {each.question!r:.80} where the annotations have "
                f"{annotation.question!r:.80} ({annotation.where})"
            )
    return [each.answer for each in given]


def read_predictions(path: str | Path, annotations: Sequence[Annotation], answer_key: str = "answer") -> Predictions:
    """Read predictions: a JSON list, an object, JSON lines or, for MMBench, a table (.tsv).

    A JSON list of strings, an object with a ``predictions`` list, JSON lines or a list of ``{question_id, answer}``, or
    an object ``{question_id: answer}``. The official files of the benchmarks and LLaVA's answers call these fields
    ``questionId``, ``image_id``, ``image`` or ``index``, and ``prediction``, ``text`` or ``caption``. Numbers are
    written out. Strings, and POPE's ``{question, answer}``, are in the annotations' order. Objects are matched by
    ``question_id``; where the benchmark's ids are not unique, they must be in the annotations' order as well.

    Args:
        path: The file.
        annotations: The annotations that they answer.
        answer_key: The answer's name where one object holds several (A-OKVQA's ``multiple_choice``).
    Raises:
        DataError: Unreadable, a wrong count, an unknown, missing or duplicate ``question_id``; names file and line.
    """
    items, manifest = _read_items(path, answer_key)
    given = [_given(path, item) for item in items]
    kinds = Counter(each.question_id is None for each in given)
    if len(kinds) > 1:
        raise DataError(
            f"{path}: {kinds[True]} predictions are strings and {kinds[False]} are objects; expected one kind"
        )
    if kinds[True] or not given:
        return Predictions(_in_order(path, given, annotations), manifest)
    return Predictions(_by_question_id(path, given, annotations), manifest)
