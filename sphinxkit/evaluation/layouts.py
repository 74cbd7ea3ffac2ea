"""The layouts of public annotation files; see docs/datasets for the table.

A layout is told by the fields of the file's first record.
Source: the data sets' own files and their evaluation scripts, as named in ``data.converters`` and in the metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sphinxkit.data.converters import Problems, Source, coco
from sphinxkit.data.converters.vqa import OCRVQA_SPLITS
from sphinxkit.data.json_stream import JsonItem, iter_json_members
from sphinxkit.errors import DataError
from sphinxkit.evaluation.annotation import Annotation, image_size
from sphinxkit.formatters import tasks
from sphinxkit.formatters.tasks.multiple_choice import LETTERS

Read = Callable[[Path, Sequence[JsonItem]], Iterator[Annotation]]


class _Fields:
    """A record whose absent fields are named in the error."""

    def __init__(self, path: Path, item: JsonItem) -> None:
        self.where = f"{path}:{item.line}"
        if not isinstance(item.value, dict):
            raise DataError(f"{self.where}: an annotation must be an object, got {type(item.value).__name__}")
        self.record: dict[str, Any] = item.value
        self.key = "" if item.key is None else item.key

    def __getitem__(self, name: str) -> Any:
        if name not in self.record:
            keys = ", ".join(sorted(self.record))
            raise DataError(f"{self.where}: the annotation has no {name!r}; its keys: {keys:.500}")
        return self.record[name]

    def choices(self, name: str = "choices") -> list[str]:
        """A list of at most 26 texts."""
        found = self[name]
        if (
            not isinstance(found, list)
            or not 0 < len(found) <= len(LETTERS)
            or not all(isinstance(x, str) for x in found)
        ):
            raise DataError(f"{self.where}: {name!r} must be a list of at most {len(LETTERS)} texts, got {found!r:.80}")
        return found

    def letter(self, name: str, choices: Sequence[str]) -> str:
        """The letter of the choice with the index ``name``."""
        index = self[name]
        if not isinstance(index, int) or not 0 <= index < len(choices):
            raise DataError(f"{self.where}: {name!r} must be the index of a choice, got {index!r:.60}")
        return LETTERS[index]

    def annotation(
        self, question_id: Any, gold: Any, *, image: object = "", question: object = "", split: str = "", **fields: Any
    ) -> Annotation:
        if isinstance(question_id, bool) or not isinstance(question_id, (str, int)):
            raise DataError(f"{self.where}: question_id must be a string or an integer, got {question_id!r:.80}")
        record = {**self.record, **fields}
        return Annotation(question_id, str(image), str(question), gold, self.where, image_size(record), record, split)


def _unified(index: int, record: _Fields) -> Annotation:
    gold = record.record.get("gt_answers", record.record.get("answers"))
    if gold is None:
        gold = record["gt_answers"]
    get = record.record.get
    return record.annotation(get("question_id", index), gold, image=get("image_path", ""), question=get("question", ""))


def _textvqa(index: int, record: _Fields) -> Annotation:
    image = f"{record['image_id']}.jpg"
    return record.annotation(record["question_id"], record["answers"], image=image, question=record["question"])


def _vizwiz(index: int, record: _Fields) -> Annotation:
    image = record["image"]
    return record.annotation(image, record["answers"], image=image, question=record["question"])


def _docvqa(index: int, record: _Fields) -> Annotation:
    image = record["image_local_name" if "image_local_name" in record.record else "image"]
    return record.annotation(record["questionId"], record["answers"], image=image, question=record["question"])


def _chartqa(index: int, record: _Fields) -> Annotation:
    return record.annotation(index, record["label"], image=record["imgname"], question=record["query"])


def _gqa(index: int, record: _Fields) -> Annotation:
    image = f"{record['imageId']}.jpg"
    return record.annotation(record.key, record["answer"], image=image, question=record["question"])


def _pope(index: int, record: _Fields) -> Annotation:
    return record.annotation(record["question_id"], record["label"], image=record["image"], question=record["text"])


def _scienceqa(index: int, record: _Fields) -> Annotation:
    split, choices = str(record["split"]), record.choices()
    image = f"{split}/{record.key}/{record['image']}" if record["image"] else ""
    question = _instruction(record, choices, str(record.record.get("hint") or ""))
    return record.annotation(record.key, record.letter("answer", choices), image=image, question=question, split=split)


def _aokvqa(index: int, record: _Fields) -> Annotation:
    choices, image = record.choices(), record["image_id"]
    name = f"{record['split']}2017/{image:012d}.jpg" if isinstance(image, int) else image
    gold = record.letter("correct_choice_idx", choices)
    return record.annotation(record["question_id"], gold, image=name, question=record["question"])


def _mmbench(index: int, record: _Fields) -> Annotation:
    number, gold = record["index"], record["answer"]
    if not number.isdecimal() or gold not in LETTERS or not gold:
        raise DataError(
            f"{record.where}: expected an index and the letter of a choice, got {number!r:.20} and {gold!r:.20}; "
            "MMBench's test split has no answers"
        )
    choices = [text for letter in LETTERS if (text := record.record.get(letter, ""))]
    original = record.record.get("image", "")
    image = f"{original if original.isdecimal() else number}.jpg"  # a rotation names the row that holds its image
    question = _instruction(record, choices, record.record.get("hint", ""))
    record.record["image"] = ""  # a picture in base64, too long to be kept for every question
    fields = {"choices": choices, "context": record.record.get("hint", "")}
    return record.annotation(int(number), gold, image=image, question=question, **fields)


def _instruction(record: _Fields, choices: Sequence[str], context: str) -> str:
    try:
        return tasks.create("multiple_choice").prompt(str(record["question"]), choices, context)
    except DataError as error:
        raise DataError(f"{record.where}: {error}") from error


def _each(read: Callable[[int, _Fields], Annotation]) -> Read:
    """A layout whose records are one question each."""
    return lambda path, items: (read(index, _Fields(path, item)) for index, item in enumerate(items))


def _ocrvqa_split(record: _Fields) -> str:
    split = record["split"]
    if not isinstance(split, int) or split not in OCRVQA_SPLITS:
        raise DataError(f"{record.where}: 'split' must be one of {list(OCRVQA_SPLITS)}, got {split!r:.60}")
    return OCRVQA_SPLITS[split]


def _ocrvqa(path: Path, items: Sequence[JsonItem]) -> Iterator[Annotation]:
    for item in items:
        record = _Fields(path, item)
        questions, answers, split = record["questions"], record["answers"], _ocrvqa_split(record)
        if not isinstance(questions, list) or not isinstance(answers, list) or len(questions) != len(answers):
            raise DataError(f"{record.where}: 'questions' and 'answers' must be lists of one length")
        image = f"{record.key}{Path(str(record['imageURL'])).suffix or '.jpg'}"
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            yield record.annotation(f"{record.key}:{number}", answer, image=image, question=question, split=split)


def _captions(path: Path, items: Sequence[JsonItem]) -> Iterator[Annotation]:
    """One annotation per image with all its captions: COCO's captions and TextCaps."""
    found: dict[Any, tuple[_Fields, list[Any]]] = {}
    for item in items:
        record = _Fields(path, item)
        key = "caption" if "caption" in record.record else "caption_str"
        found.setdefault(str(record["image_id"]), (record, []))[1].append(record[key])
    is_coco = "caption" in next(iter(found.values()))[0].record
    names = _file_names(path) if is_coco else {}
    for image_id, (record, captions) in found.items():
        if is_coco and image_id not in names:
            raise DataError(f"{record.where}: image_id {image_id} is not among the images")
        yield record.annotation(image_id, captions, image=names.get(image_id, f"{image_id}.jpg"))


def _file_names(path: Path) -> dict[str, str]:
    images = (_Fields(path, item) for _, item in iter_json_members(path, ["images"]))
    return {str(image["id"]): str(image["file_name"]) for image in images}


def _instances(path: Path, items: Sequence[JsonItem]) -> Iterator[Annotation]:
    """One annotation per image and category that it shows, with the id "IMAGE:CATEGORY"."""
    first = next(iter_json_members(path, ["images"]), None)
    is_lvis = first is not None and isinstance(first[1].value, dict) and "not_exhaustive_category_ids" in first[1].value
    converter = coco.lvis if is_lvis else coco.detection
    for found in converter(Source(path), Problems(strict=True)):
        sample = found.sample
        size = (sample.geometry.width, sample.geometry.height)
        gold = {sample.category: [[box.x1, box.y1, box.x2, box.y2] for box in sample.boxes]}
        fields = {"category": sample.category, "width": size[0], "height": size[1]}
        yield Annotation(found.id, found.image, "", gold, f"{path}:{found.line}", size, fields)


# The fields that tell a layout, and its reader; the first layout whose fields the first record has is taken.
LAYOUTS: tuple[tuple[tuple[str, ...], Read], ...] = (
    (("gt_answers",), _each(_unified)),
    (("question_id", "choices", "direct_answers"), _each(_aokvqa)),
    (("question_id", "image_id", "question", "answers"), _each(_textvqa)),
    (("questionId", "question", "answers"), _each(_docvqa)),
    (("image", "question", "answers"), _each(_vizwiz)),
    (("imgname", "query", "label"), _each(_chartqa)),
    (("imageId", "question", "answer"), _each(_gqa)),
    (("imageURL", "questions", "answers"), _ocrvqa),
    (("question", "choices", "answer", "split"), _each(_scienceqa)),
    (("question_id", "image", "text", "label"), _each(_pope)),
    (("index", "question", "A", "B"), _each(_mmbench)),
    (("image_id", "category_id", "bbox"), _instances),
    (("image_id", "caption"), _captions),
    (("image_id", "caption_str"), _captions),
)


def read_layout(path: Path, items: Sequence[JsonItem]) -> Iterator[Annotation]:
    """The annotations of a file's records.

    Raises:
        DataError: A record lacks a field of the layout; names file and line.
    """
    first = items[0].value if items and isinstance(items[0].value, dict) else {}
    read = next((read for fields, read in LAYOUTS if first.keys() >= set(fields)), _each(_unified))
    return read(path, items)
