"""Questions and captions: VQAv2, GQA, OCR-VQA, TextCaps, and LLaVA conversations.

Source: visualqa.org/download; cs.stanford.edu/people/dorarad/gqa/download; ocr-vqa.github.io; textvqa.org/textcaps;
LLaVA, arXiv:2304.08485.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from sphinxkit.data.conversations import read_record
from sphinxkit.data.converters.base import (
    Converted,
    Problems,
    RecordError,
    Source,
    a_list,
    a_number,
    a_text,
    an_id,
    an_object,
    name_of,
)
from sphinxkit.data.converters.disk_tables import DiskTables
from sphinxkit.data.json_stream import iter_json, iter_json_members, iter_records
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
    return Counter(answers).most_common(1)[0][0]


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
            suffix = PurePosixPath(urlsplit(a_text(record, "imageURL")).path).suffix or ".jpg"
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


def textcaps(source: Source, problems: Problems) -> Iterator[Converted]:
    """One sample per caption of a TextCaps file."""
    for _, item in iter_json_members(source.path, ["data"], problems.on(source.path)):
        try:
            record = an_object(item.value)
            image_id = an_id(record, "image_id")
            captions = [record] if "caption_str" in record else a_list(record, "reference_strs")
            image = str(record.get("image_name") or image_id)
            image = image if PurePosixPath(image).suffix else f"{image}.jpg"
            for index, entry in enumerate(captions):
                text = a_text(entry if isinstance(entry, dict) else {"caption_str": entry}, "caption_str")
                sample_id = str(record.get("caption_id", f"{image_id}:{index}"))
                yield Converted(sample_id, image, CaptionSample(text), source.path, item.line)
        except RecordError as error:
            problems.add(source.path, item.line, f"{name_of(item.value, 'caption_id', 'image_id')}{error}")


def llava(source: Source, problems: Problems) -> Iterator[Converted]:
    """Conversations as they are: a JSON list or JSON lines of {"id", "image", "conversations": [...]}."""
    for item in iter_records(source.path, problems.on(source.path)):
        try:
            record = an_object(item.value)
            sample_id = str(record.get("id", item.line))
            messages, image = read_record(record, where := f"{source.path}:{item.line}")
            yield Converted(sample_id, image, messages, source.path, item.line)
        except RecordError as error:
            problems.add(source.path, item.line, str(error))
        except DataError as error:
            reason = str(error).removeprefix(f"{where}: ")
            problems.add(source.path, item.line, f"{name_of(item.value, 'id')}{reason}")
