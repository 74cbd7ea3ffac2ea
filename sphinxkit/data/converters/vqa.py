"""Questions and captions: VQAv2, GQA, OCR-VQA, TextVQA, TextCaps.

Source: visualqa.org/download; cs.stanford.edu/people/dorarad/gqa/download; ocr-vqa.github.io; textvqa.org/dataset;
textvqa.org/textcaps.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from sphinxkit.data.converters.base import (
    Converted,
    Problems,
    RecordError,
    Samples,
    Source,
    a_list,
    a_number,
    a_text,
    an_id,
    an_object,
    convert_each,
    last_parts,
    most_frequent,
    name_of,
    texts_of,
)
from sphinxkit.data.converters.disk_tables import DiskTables
from sphinxkit.data.json_stream import JsonItem, iter_json, iter_json_members
from sphinxkit.errors import DataError
from sphinxkit.formatters.tasks import CaptionSample, QuestionSample

OCRVQA_SPLITS = {1: "train", 2: "val", 3: "test"}


def _vqav2_files(source: Source) -> tuple[Path, Path]:
    if not source.path.is_dir():
        return source.path, source.need_companion("VQAv2's annotations file (v2_mscoco_*_annotations.json)")
    found = []
    for kind in ("questions", "annotations"):
        files = sorted(source.path.glob(f"*{kind}.json"))
        if len(files) != 1:
            raise DataError(f"{source.path}: expected one *{kind}.json, found {len(files)}")
        found.append(files[0])
    return found[0], found[1]


def vqav2(source: Source, problems: Problems) -> Iterator[Converted]:
    """One sample per annotated question; the answer is the most frequent one. Others are left out.

    The source is the questions file with the annotations file as companion, or the folder of both.
    """
    questions, annotations = _vqav2_files(source)
    with DiskTables() as tables:
        subset = ""
        for member, item in iter_json_members(questions, ["data_subtype", "questions"], problems.on(questions)):
            try:
                if member == "data_subtype":
                    subset = str(item.value)
                    continue
                record = an_object(item.value)
                entry = [an_id(record, "image_id"), a_text(record, "question")]
                tables.put("questions", an_id(record, "question_id"), entry, item.line)
            except RecordError as error:
                problems.add(questions, item.line, f"questions: {name_of(item.value, 'question_id')}{error}")
        tables.report_repeated("questions", problems, questions)
        for _, item in iter_json_members(annotations, ["annotations"], problems.on(annotations)):
            try:
                record = an_object(item.value)
                question_id = an_id(record, "question_id")
                found = tables.get("questions", question_id)
                if found is None:
                    raise RecordError("it is not among the questions")
                image_id, question = found
                sample = QuestionSample(question, _vqav2_answer(record))
                if not str(image_id).isdecimal():
                    raise RecordError(f"image_id {image_id!r} is not one of COCO's")
                image = f"COCO_{subset}_{int(image_id):012d}.jpg"
                yield Converted(str(question_id), image, sample, annotations, item.line)
            except RecordError as error:
                problems.add(annotations, item.line, f"annotations: {name_of(item.value, 'question_id')}{error}")


def _vqav2_answer(record: dict[str, Any]) -> str:
    if record.get("multiple_choice_answer"):
        return a_text(record, "multiple_choice_answer")
    answers = [a_text(an_object(answer), "answer") for answer in a_list(record, "answers")]
    if not answers:
        raise RecordError("'answers' is empty")
    return most_frequent(answers)


def gqa(source: Source, problems: Problems) -> Iterator[Converted]:
    """One sample per question of an object {question_id: {"imageId", "question", "answer", ...}}."""
    for item in iter_json(source.path, problems.on(source.path)):
        try:
            record = an_object(item.value)
            image = f"{an_id(record, 'imageId')}.jpg"
            sample = QuestionSample(a_text(record, "question"), a_text(record, "answer"))
            yield Converted(str(item.key), image, sample, source.path, item.line)
        except RecordError as error:
            problems.add(source.path, item.line, f"question {item.key}: {error}")


def ocrvqa(source: Source, problems: Problems) -> Iterator[Converted]:
    """One sample per question of dataset.json; ``split`` is train, val or test."""
    for item in iter_json(source.path, problems.on(source.path)):
        try:
            record = an_object(item.value)
            if source.split is not None and OCRVQA_SPLITS.get(int(a_number(record, "split"))) != source.split:
                continue
            questions, answers = a_list(record, "questions"), a_list(record, "answers")
            if len(questions) != len(answers):
                raise RecordError(f"{len(questions)} questions but {len(answers)} answers")
            suffix = PurePosixPath(last_parts(a_text(record, "imageURL"), 1)).suffix or ".jpg"
        except RecordError as error:
            problems.add(source.path, item.line, f"image {item.key}: {error}")
            continue
        for index, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            try:
                pair = {"question": question, "answer": answer}
                sample = QuestionSample(a_text(pair, "question"), a_text(pair, "answer"))
            except RecordError as error:
                problems.add(source.path, item.line, f"image {item.key}: question {index}: {error}")
                continue
            yield Converted(f"{item.key}:{index}", f"{item.key}{suffix}", sample, source.path, item.line)


def textvqa(source: Source, problems: Problems) -> Iterator[Converted]:
    """One sample per question of a TextVQA file; the answer is the most frequent one.

    With the Rosetta OCR file as companion, the words read in the image follow the question in a line "Reference OCR
    token: ...", as in LLaVA-1.5's data (arXiv:2310.03744, section 3).
    """
    with DiskTables() as tables:
        if source.companion is not None:
            for _, item in iter_json_members(source.companion, ["data"], problems.on(source.companion)):
                try:
                    record = an_object(item.value)
                    tokens = [str(token) for token in a_list(record, "ocr_tokens")]
                    tables.put("images", an_id(record, "image_id"), tokens, item.line)
                except RecordError as error:
                    problems.add(source.companion, item.line, f"{name_of(item.value, 'image_id')}{error}")
            tables.report_repeated("images", problems, source.companion)

        def make(item: JsonItem, record: dict[str, Any]) -> Samples:
            image_id, question = an_id(record, "image_id"), a_text(record, "question")
            tokens = tables.get("images", image_id) or []
            line = f"\nReference OCR token: {', '.join(tokens)}" if tokens else ""
            sample = QuestionSample(question + line, most_frequent(texts_of(record, "answers")))
            yield str(an_id(record, "question_id")), f"{image_id}.jpg", sample

        items = (item for _, item in iter_json_members(source.path, ["data"], problems.on(source.path)))
        yield from convert_each(source.path, items, problems, make, "question_id", "image_id")


def textcaps(source: Source, problems: Problems) -> Iterator[Converted]:
    """One sample per caption of a TextCaps file."""

    def make(item: JsonItem, record: dict[str, Any]) -> Samples:
        image_id = an_id(record, "image_id")
        captions = [record] if "caption_str" in record else a_list(record, "reference_strs")
        image = str(record.get("image_name") or image_id)
        image = image if PurePosixPath(image).suffix else f"{image}.jpg"
        for index, entry in enumerate(captions):
            text = a_text(entry if isinstance(entry, dict) else {"caption_str": entry}, "caption_str")
            yield str(record.get("caption_id", f"{image_id}:{index}")), image, CaptionSample(text)

    items = (item for _, item in iter_json_members(source.path, ["data"], problems.on(source.path)))
    return convert_each(source.path, items, problems, make, "caption_id", "image_id")
