"""Questions about documents and charts: DocVQA, InfographicVQA, ChartQA.

Source: docvqa.org; arXiv:2007.00398; arXiv:2104.12756; github.com/vis-nlp/ChartQA, arXiv:2203.10244.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sphinxkit.data.converters.base import Converted, Problems, Samples, Source, a_text, an_id, convert_each, texts_of
from sphinxkit.data.json_stream import JsonItem, iter_json_members, iter_records
from sphinxkit.formatters.tasks import QuestionSample


def docvqa(source: Source, problems: Problems) -> Iterator[Converted]:
    """One sample per question of DocVQA or InfographicVQA; the answer is the first of the accepted ones."""

    def make(item: JsonItem, record: dict[str, Any]) -> Samples:
        image = a_text(record, "image_local_name" if "image_local_name" in record else "image")
        sample = QuestionSample(a_text(record, "question"), texts_of(record, "answers")[0])
        yield str(an_id(record, "questionId")), image, sample

    items = (item for _, item in iter_json_members(source.path, ["data"], problems.on(source.path)))
    return convert_each(source.path, items, problems, make, "questionId")


def chartqa(source: Source, problems: Problems) -> Iterator[Converted]:
    """One sample per question of ChartQA (train_human.json, train_augmented.json); images lie in its folder ``png``."""
    count = 0

    def make(item: JsonItem, record: dict[str, Any]) -> Samples:
        nonlocal count
        image, count = a_text(record, "imgname"), count + 1
        yield f"{image}:{count - 1}", image, QuestionSample(a_text(record, "query"), a_text(record, "label"))

    return convert_each(source.path, iter_records(source.path, problems.on(source.path)), problems, make, "imgname")
