"""JSON lines, and JSON lists as LLaVA's files are: random access by byte offset."""

from __future__ import annotations

import json
import mmap
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sphinxkit.data.sources.base import Entry, ShardIndex
from sphinxkit.errors import DataError

IMAGE_KEY = b'"image'  # begins the keys "image" and "images" in JSON
BOM = b"\xef\xbb\xbf"
BLOCK = 1 << 23  # bytes of lines that are looked at at a time; our choice
WINDOW = 1 << 20  # bytes of a list that are decoded at a time; our choice


def _has_image(record: Any, image: str) -> bool:
    return isinstance(record, dict) and bool(record.get(image, record.get("image")) or record.get("images"))


def _line_has_image(line: bytes, image: str) -> bool:
    try:
        return _has_image(json.loads(line), image)
    except (ValueError, RecursionError):
        return True  # the reader reports it


class _JsonShard:
    """An open file of JSON; ``columns`` maps our names to the file's."""

    def __init__(self, path: Path, columns: Mapping[str, str], is_list: bool) -> None:
        self.columns, self.is_list = columns, is_list
        self.file = path.open("rb")

    def close(self) -> None:
        self.file.close()

    def read(self, entry: Entry, row: int, where: str) -> Mapping[str, Any]:
        self.file.seek(entry.offset)
        text = self.file.read(entry.extent) if self.is_list else self.file.readline()
        try:
            fields = json.loads(text.removeprefix(BOM))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise DataError(f"{where}: a record must be an object, got {type(fields).__name__}")
        return {**fields, **{name: fields[column] for name, column in self.columns.items() if column in fields}}


class JsonLines:
    """One record a line; empty lines are skipped. An entry's extent is its line."""

    suffixes: tuple[str, ...] = (".jsonl", ".ndjson")
    rows_per_entry: bool = False
    max_open: int = 64  # our choice

    def scan(self, path: Path, image: str) -> ShardIndex:
        """Index the lines, block by block; only lines that may have an image are parsed."""
        parts: list[np.ndarray[Any, Any]] = [np.empty((0, 3), np.uint64)]
        masks: list[np.ndarray[Any, Any]] = [np.empty(0, np.bool_)]
        keys = {IMAGE_KEY, *(json.dumps(image, ensure_ascii=is_ascii).encode() for is_ascii in (True, False))}
        offset, num_lines, num_records, last, is_ended = 0, 0, 0, b"", True
        with path.open("rb") as file:
            while block := file.read(BLOCK) + file.readline():
                is_ended = block.endswith(b"\n")
                lines = block.removesuffix(b"\n").split(b"\n")
                sizes = np.fromiter(map(len, lines), np.int64, len(lines)) + 1
                if not offset:
                    lines[0] = lines[0].removeprefix(BOM)
                kept = [number for number, line in enumerate(lines) if line and not line.isspace()]
                if kept:
                    last = lines[kept[-1]]
                    if not num_records and lines[kept[0]].lstrip().startswith(b"["):
                        raise DataError(f"{path}: expected JSON lines, got a JSON list; write `format: llava`")
                found = [
                    any(key in lines[number] for key in keys) and _line_has_image(lines[number], image)
                    for number in kept
                ]
                rows = np.empty((len(kept), 3), np.uint64)
                rows[:, 0] = (offset + np.cumsum(sizes) - sizes)[kept]
                rows[:, 1] = np.array(kept, np.int64) + num_lines + 1
                rows[:, 2] = np.arange(num_records, num_records + len(kept))
                parts.append(rows)
                masks.append(np.array(found, np.bool_))
                offset, num_lines, num_records = offset + len(block), num_lines + len(lines), num_records + len(kept)
        if num_records and not is_ended:
            _check_end(path, last, int(parts[-1][-1, 1]))
        return ShardIndex.of(np.concatenate(parts), np.concatenate(masks))

    def place(self, entry: Entry, row: int) -> str:
        """The line."""
        return f":{entry.extent}"

    def open(self, path: Path, columns: Mapping[str, str]) -> _JsonShard:
        """Open a file."""
        return _JsonShard(path, columns, is_list=False)


def _check_end(path: Path, line: bytes, number: int) -> None:
    try:
        json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: the file is cut off: line {number}, the last, is not JSON ({error})") from error


class JsonList:
    """A JSON list of records, as LLaVA publishes its data. An entry's extent is its length in bytes."""

    suffixes: tuple[str, ...] = (".json",)
    rows_per_entry: bool = False
    max_open: int = 64  # our choice

    def scan(self, path: Path, image: str) -> ShardIndex:
        """Index the elements.

        Bytes are read as Latin-1, which leaves JSON's structure alone and makes a character a byte.
        """
        rows, has_image = array("Q"), bytearray()
        decoder = json.JSONDecoder()
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            place = _skip_space(data, len(BOM) if data[: len(BOM)] == BOM else 0)
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
                            where = f"{path}[{len(has_image)}]"
                            raise DataError(f"{where}: the file is cut off or not JSON: {error}") from error
                        start, text = place, data[place : place + size].decode("latin-1")
                        size *= 2
                rows.extend((place, start + end - place, len(has_image)))
                has_image.append(_has_image(value, image))
                place = _skip_space(data, start + end)
                if data[place : place + 1] == b",":
                    place = _skip_space(data, place + 1)
                elif data[place : place + 1] != b"]":
                    raise DataError(f"{path}[{len(has_image)}]: expected ',' or ']', got {data[place : place + 16]!r}")
        return ShardIndex.of(np.array(rows, np.uint64).reshape(-1, 3), np.frombuffer(has_image, np.bool_))

    def place(self, entry: Entry, row: int) -> str:
        """The element."""
        return f"[{entry.number}]"

    def open(self, path: Path, columns: Mapping[str, str]) -> _JsonShard:
        """Open a file."""
        return _JsonShard(path, columns, is_list=True)


def _skip_space(data: mmap.mmap, place: int) -> int:
    while data[place : place + 1] in (b" ", b"\t", b"\r", b"\n"):
        place += 1
    return place
