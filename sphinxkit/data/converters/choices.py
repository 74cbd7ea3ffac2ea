"""Questions with choices: ScienceQA and A-OKVQA.

Source: github.com/lupantech/ScienceQA, arXiv:2209.09513; github.com/allenai/aokvqa, arXiv:2206.01718.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sphinxkit.data.converters.base import (
    Converted,
    Problems,
    RecordError,
    Samples,
    Source,
    a_text,
    an_id,
    convert_each,
    most_frequent,
    texts_of,
)
from sphinxkit.data.json_stream import JsonItem, iter_json, iter_records
from sphinxkit.formatters.tasks import MultipleChoiceSample, QuestionSample


def _right(record: dict[str, Any], key: str) -> int:
    index = record.get(key)
    if isinstance(index, bool) or not isinstance(index, int):
        raise RecordError(f"{key!r} must be the index of a choice, got {index!r:.60}")
    return index


def scienceqa(source: Source, problems: Problems) -> Iterator[Converted]:
    """One sample per question of problems.json, its ``hint`` as context; questions without an image are texts.

    An image's path is SPLIT/QUESTION/image.png. ``split`` is train, val, test, minitrain, minival or minitest.
    """

    def make(item: JsonItem, record: dict[str, Any]) -> Samples:
        split = a_text(record, "split")
        if source.split is not None and split != source.split:
            return
        image = f"{split}/{item.key}/{a_text(record, 'image')}" if record.get("image") else ""
        hint = a_text(record, "hint") if record.get("hint") else ""
        choices = tuple(texts_of(record, "choices"))
        yield (
            str(item.key),
            image,
            MultipleChoiceSample(a_text(record, "question"), choices, _right(record, "answer"), hint),
        )

    return convert_each(source.path, iter_json(source.path, problems.on(source.path)), problems, make)


def _aokvqa(
    source: Source, problems: Problems, sample: type[MultipleChoiceSample | QuestionSample]
) -> Iterator[Converted]:
    def make(item: JsonItem, record: dict[str, Any]) -> Samples:
        image_id = record.get("image_id")
        if isinstance(image_id, bool) or not isinstance(image_id, int) or image_id < 0:
            raise RecordError(f"'image_id' must be one of COCO's, got {image_id!r:.60}")
        image = f"{a_text(record, 'split')}2017/{image_id:012d}.jpg"
        question, question_id = a_text(record, "question"), str(an_id(record, "question_id"))
        if sample is QuestionSample:
            yield question_id, image, QuestionSample(question, most_frequent(texts_of(record, "direct_answers")))
        else:
            choices = tuple(texts_of(record, "choices"))
            yield question_id, image, MultipleChoiceSample(question, choices, _right(record, "correct_choice_idx"))

    items = iter_records(source.path, problems.on(source.path))
    return convert_each(source.path, items, problems, make, "question_id")


def aokvqa_choices(source: Source, problems: Problems) -> Iterator[Converted]:
    """One sample per question of aokvqa_v1p0_SPLIT.json with its choices; images are COCO 2017's, in SPLIT2017."""
    return _aokvqa(source, problems, MultipleChoiceSample)


def aokvqa_direct(source: Source, problems: Problems) -> Iterator[Converted]:
    """One sample per question with the most frequent of the direct answers."""
    return _aokvqa(source, problems, QuestionSample)
