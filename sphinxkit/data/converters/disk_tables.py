"""Group and join annotations that do not fit into memory: tables in a temporary SQLite file.

COCO lists annotations in any order and images before or after them; to write one sample per image, they have to be
brought together. SQLite sorts on disk with a fixed cache, so the memory does not grow with the file.
"""

from __future__ import annotations

import json
import sqlite3
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any

from sphinxkit.data.converters.base import Problems, RecordError

CACHE_KIB = 32 * 1024  # SQLite's page cache; our choice
BATCH = 5_000  # rows per insert; our choice


class DiskTables:
    """Rows grouped by key, and a dictionary, both on disk. A context manager; it removes its file on exit.

    Keys are integers or texts; 1 and "1" are the same key, as annotation files mix them.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="sphinxkit-convert-")
        self._base = sqlite3.connect(Path(self._folder.name) / "tables.sqlite")
        self._base.executescript(
            f"pragma journal_mode=off; pragma synchronous=off; pragma cache_size=-{CACHE_KIB};"
            "create table rows (key text, line integer, value text);"
            "create table entries (space text, key text, line integer, value text);"
        )
        self._rows: list[tuple[str, int, str]] = []
        self._entries: list[tuple[str, str, int, str]] = []

    def __enter__(self) -> DiskTables:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._base.close()
        self._folder.cleanup()

    def add(self, key: int | str, line: int, value: Any) -> None:
        """Add one row (anything that JSON holds) to the group ``key``."""
        self._rows.append((str(key), line, json.dumps(value)))
        if len(self._rows) >= BATCH:
            self._flush()

    def put(self, space: str, key: int | str, value: Any, line: int = 0) -> None:
        """Set entry ``key`` of the dictionary ``space``; see ``report_repeated`` for a key that is set again."""
        self._entries.append((space, str(key), line, json.dumps(value)))
        if len(self._entries) >= BATCH:
            self._flush()

    def get(self, space: str, key: int | str) -> Any:
        """Entry ``key`` of the dictionary ``space``, or None.

        Raises:
            RecordError: It was set more than once, to different values.
        """
        self._index()
        found = self._base.execute(
            "select distinct value from entries where space = ? and key = ? limit 2", (space, str(key))
        ).fetchall()
        if len(found) > 1:
            raise RecordError(f"id {key} is there more than once among the {space}, with different content")
        return json.loads(found[0][0]) if found else None

    def report_repeated(self, space: str, problems: Problems, path: Path) -> None:
        """Report every key of a dictionary that was set more than once."""
        self._index()
        rows = self._base.execute(
            "select key, max(line), count(*), count(distinct value) from entries where space = ? "
            "group by key having count(*) > 1 order by min(rowid)",
            (space,),
        )
        for key, line, count, num_values in rows:
            what = "each time the same" if num_values == 1 else "with different content; what refers to it is left out"
            problems.add(path, line, f"{space}: id {key} is there {count} times, {what}")

    def _index(self) -> None:
        if self._entries:
            self._flush()
        self._base.execute("create index if not exists keys on entries (space, key)")

    def groups(self) -> Iterator[tuple[str, list[tuple[int, Any]]]]:
        """(key, its rows as (line, value) in the order they came), keys in the order of their first row."""
        self._flush()
        self._base.execute("create table firsts as select key, min(rowid) as first from rows group by key")
        rows = self._base.execute(
            "select rows.key, rows.line, rows.value from rows join firsts using (key) order by firsts.first, rows.rowid"
        )
        for key, group in groupby(rows, key=lambda row: str(row[0])):
            yield key, [(line, json.loads(value)) for _, line, value in group]

    def _flush(self) -> None:
        self._base.executemany("insert into rows values (?, ?, ?)", self._rows)
        self._base.executemany("insert into entries values (?, ?, ?, ?)", self._entries)
        self._rows.clear()
        self._entries.clear()
