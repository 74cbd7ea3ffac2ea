"""JSON lines, and JSON lists as LLaVA's files are: random access by byte offset."""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sphinxkit.data.sources.base import Record, ShardIndex
from sphinxkit.errors import DataError

IMAGE_KEY = b'"image'  # begins the keys "image" and "images" in JSON
BOM = b"\xef\xbb\xbf"
WINDOW = 1 << 20  # bytes of a list that are decoded at a time; our choice


def _has_image(record: Any) -> bool:
    return isinstance(record, dict) and bool(record.get("image") or record.get("images"))


def _line_has_image(line: bytes) -> bool:
    """Only lines that may have an image are parsed."""
    if IMAGE_KEY not in line:
        return False
    try:
        return _has_image(json.loads(line.removeprefix(BOM)))
    except (ValueError, RecursionError):
        return True  # the reader reports it


class _JsonShard:
    """An open file of JSON; ``columns`` maps our names to the file's."""

    def __init__(self, path: Path, columns: Mapping[str, str], is_list: bool) -> None:
        self.path, self.columns, self.is_list = path, columns, is_list
        self.file = path.open("rb")

    def close(self) -> None:
        self.file.close()

    def read(self, offset: int, extent: int, number: int, row: int) -> Record:
        where = f"{self.path}[{number}]" if self.is_list else f"{self.path}:{extent}"
        self.file.seek(offset)
        text = self.file.read(extent) if self.is_list else self.file.readline()
        try:
            fields = json.loads(text.removeprefix(BOM))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise DataError(f"{where}: a record must be an object, got {type(fields).__name__}")
        found = {name: fields[column] for name, column in self.columns.items() if column in fields}
        return Record({**fields, **found}, where)


class JsonLines:
    """One record a line; empty lines are skipped."""

    suffixes: tuple[str, ...] = (".jsonl", ".ndjson")
    rows_per_entry: bool = False

    def scan(self, path: Path) -> ShardIndex:
        """Index the lines: offset and line number."""
        rows: list[tuple[int, int, int]] = []
        has_image: list[bool] = []
        offset, line = 0, b""
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not rows and line.lstrip(BOM + b" \t").startswith(b"["):
                    raise DataError(f"{path}: expected JSON lines, got a JSON list; write `format: llava`")
                if not line.isspace():
                    rows.append((offset, number, len(rows)))
                    has_image.append(_line_has_image(line))
                offset += len(line)
        if rows and not line.endswith(b"\n"):
            _check_end(path, line, rows[-1][1])
        return ShardIndex.of(rows, has_image)

    def open(self, path: Path, columns: Mapping[str, str]) -> _JsonShard:
        """Open a file."""
        return _JsonShard(path, columns, is_list=False)


def _check_end(path: Path, line: bytes, number: int) -> None:
    try:
        json.loads(line.removeprefix(BOM))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: the file is cut off: line {number}, the last, is not JSON ({error})") from error


class JsonList:
    """A JSON list of records, as LLaVA publishes its data."""

    suffixes: tuple[str, ...] = (".json",)
    rows_per_entry: bool = False

    def scan(self, path: Path) -> ShardIndex:
        """Index the elements: offset and length in bytes.

        Bytes are read as Latin-1, which leaves JSON's structure alone and makes a character a byte.
        """
        rows: list[tuple[int, int, int]] = []
        has_image: list[bool] = []
        decoder = json.JSONDecoder()
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            place = 3 if data[:3] == BOM else 0
            place = _skip_space(data, place)
            if data[place : place + 1] != b"[":
                raise DataError(f"{path}: expected a JSON list of records, it starts with {data[:16]!r}")
            place = _skip_space(data, place + 1)
            start, text = place, ""
            while data[place : place + 1] != b"]":
                size = WINDOW
                while True:
                    try:
                        value, end = decoder.raw_decode(text, place - start)
                        break
                    except (ValueError, RecursionError) as error:
                        if start == place and start + len(text) >= len(data):
                            where = f"{path}[{len(rows)}]"
                            raise DataError(f"{where}: the file is cut off or not JSON: {error}") from error
                        start, text = place, data[place : place + size].decode("latin-1")
                        size *= 2
                rows.append((place, start + end - place, len(rows)))
                has_image.append(_has_image(value))
                place = _skip_space(data, start + end)
                if data[place : place + 1] == b",":
                    place = _skip_space(data, place + 1)
                elif data[place : place + 1] != b"]":
                    raise DataError(f"{path}[{len(rows)}]: expected ',' or ']', got {data[place : place + 16]!r}")
        return ShardIndex.of(rows, has_image)

    def open(self, path: Path, columns: Mapping[str, str]) -> _JsonShard:
        """Open a file."""
        return _JsonShard(path, columns, is_list=True)


def _skip_space(data: mmap.mmap, place: int) -> int:
    while data[place : place + 1] in (b" ", b"\t", b"\r", b"\n"):
        place += 1
    return place
