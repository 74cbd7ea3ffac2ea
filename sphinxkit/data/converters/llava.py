"""Conversations: LLaVA-Instruct, LLaVA-665K, ShareGPT, ShareGPT4V.

Source: LLaVA, arXiv:2304.08485; LLaVA-1.5, arXiv:2310.03744; ShareGPT4V, arXiv:2311.12793.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sphinxkit.data.conversations import read_record
from sphinxkit.data.converters.base import Converted, Problems, RecordError, Samples, Source, convert_each
from sphinxkit.data.json_stream import JsonItem, iter_records
from sphinxkit.errors import DataError


def llava(source: Source, problems: Problems) -> Iterator[Converted]:
    """Conversations as they are: a JSON list or JSON lines of {"id", "image", "conversations": [...]}.

    Rows with an image and rows of text may alternate. Turns before the first question and after the last answer
    (ShareGPT's cut conversations) are left out.
    """

    def make(item: JsonItem, record: dict[str, Any]) -> Samples:
        where = f"{source.path}:{item.line}"
        try:
            messages, image = read_record(record, where, trim=True)
        except DataError as error:
            raise RecordError(str(error).removeprefix(f"{where}: ")) from error
        yield str(record.get("id", item.line)), image, messages

    items = iter_records(source.path, problems.on(source.path))
    return convert_each(source.path, items, problems, make, "id")
