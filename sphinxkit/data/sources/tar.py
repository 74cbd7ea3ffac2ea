"""Tar archives as webdataset lays them out: the members of a record share their name up to the first dot.

Source: https://github.com/webdataset/webdataset (layout); POSIX.1-1988 ustar, GNU and pax headers.
"""

from __future__ import annotations

import json
import mmap
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from sphinxkit.data.samples import StoredImage
from sphinxkit.data.sources.base import Entry, ShardIndex
from sphinxkit.errors import DataError

BLOCK = 512
IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
TABLES = ("jsonl", "ndjson", "csv", "tsv", "parquet", "gz", "zst", "tar")
"""Endings of files that hold many records of their own; none is a member of a record."""
REGULAR = (b"0", b"\0", b"7")
_SPACES = b" " * 8


def _number(field: bytes) -> int:
    """A size: octal text, or base 256 where the first bit is set."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.rstrip(b"\0 ") or b"0", 8)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _pax_path(data: bytes) -> str:
    while data:
        length = int(data.split(b" ", 1)[0])
        if length < 1:
            raise ValueError("an extended header has no length")
        key, _, value = data[:length].split(b" ", 1)[1].rstrip(b"\n").partition(b"=")
        if key == b"path":
            return value.decode("utf-8", "surrogateescape")
        data = data[length:]
    return ""


def members(data: Any, path: Path | str, *, is_whole: bool = False) -> Iterator[tuple[str, int, int, int]]:
    """(name, start of its headers, start of its content, size) of every regular file that is not hidden.

    Args:
        data: The archive's bytes, or some of its members': bytes or a memory map.
        path: For messages.
        is_whole: Whether an end mark must follow the last member, as in every complete archive.
    Raises:
        DataError: A header is damaged, or the archive ends inside a member or without its end mark.
    """
    place, begin, long_name, end = 0, 0, "", len(data)
    while place < end:
        head = data[place : place + BLOCK]
        if not head.strip(b"\0"):
            return
        try:
            if len(head) < BLOCK or int(head[148:156].rstrip(b"\0 "), 8) != sum(head[:148] + _SPACES + head[156:]):
                raise ValueError("the header's checksum is wrong")
            size, kind, content = _number(head[124:136]), head[156:157], place + BLOCK
            if kind == b"x":
                long_name = _pax_path(data[content : content + size]) or long_name
        except (ValueError, IndexError) as error:
            raise DataError(f"{path}: damaged or cut off at byte {place}: {error}") from error
        if content + size > end:
            raise DataError(f"{path}: cut off: a member at byte {place} has {size} bytes, {end - content} are there")
        if kind == b"L":
            long_name = _text(data[content : content + size])
        elif kind not in (b"x", b"g", b"K"):
            if kind in REGULAR:
                prefix = _text(head[345:500]) if head[257:263] == b"ustar\0" else ""
                name = long_name or (f"{prefix}/" if prefix else "") + _text(head[:100])
                if not name.rpartition("/")[2].startswith("."):
                    yield name, begin, content, size
            long_name = ""
            begin = content + -(-size // BLOCK) * BLOCK
        place = content + -(-size // BLOCK) * BLOCK
    if is_whole:
        raise DataError(f"{path}: cut off: the archive ends without its end mark after {end} bytes")


def split_name(name: str) -> tuple[str, str]:
    """Key and ending of a member: the name up to the first dot of its last part, and the rest in lower case."""
    folder, _, last = name.rpartition("/")
    stem, _, ending = last.partition(".")
    return f"{folder}/{stem}", ending.lower()


class _TarShard:
    def __init__(self, path: Path, columns: Mapping[str, str]) -> None:
        self.path, self.columns = path, columns
        self.file = path.open("rb")

    def close(self) -> None:
        self.file.close()

    def read(self, entry: Entry, row: int, where: str) -> Mapping[str, Any]:
        self.file.seek(entry.offset)
        data = self.file.read(entry.extent * BLOCK)
        found = {split_name(name)[1]: (name, data[at : at + size]) for name, _, at, size in members(data, where)}
        pictures = (self.columns["image"],) if "image" in self.columns else IMAGES
        wanted = {"txt", *self.columns.values()}.difference(pictures)
        fields: dict[str, Any] = {}
        try:
            if "json" in found:
                described = json.loads(found["json"][1])
                fields |= described if isinstance(described, dict) else {}
                fields.pop("image", None)  # the picture is a member of its own
            texts = {ending: found[ending][1].decode() for ending in wanted if ending in found}
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: a member is not valid text or JSON: {error}") from error
        if "txt" in texts:
            fields["caption"] = texts["txt"]
        values = {**fields, **texts}
        fields |= {name: values[column] for name, column in self.columns.items() if column in values}
        picture = next((found[ending] for ending in pictures if ending in found), None)
        if picture is not None:
            fields["image"] = StoredImage(f"{self.path}:{PurePosixPath(picture[0])}", picture[1])
        return fields


class Tar:
    """Tar archives that are not compressed. An entry's extent is its length in blocks of 512 bytes."""

    suffixes: tuple[str, ...] = (".tar",)
    rows_per_entry: bool = False
    max_open: int = 64  # our choice

    def scan(self, path: Path, image: str) -> ShardIndex:
        """Index the records.

        Raises:
            DataError: The archive is damaged, or packs files of records instead of records.
        """
        endings = (*IMAGES, image)
        rows, has_image, key = array("Q"), bytearray(), None
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for name, begin, start, size in members(data, path, is_whole=True):
                found, ending = split_name(name)
                if ending.rpartition(".")[2] in TABLES:
                    raise DataError(
                        f"{path}: a tar archive of {name!r:.80}, expected members of records (KEY.jpg, KEY.txt, "
                        "KEY.json); unpack it and name that file"
                    )
                if found != key:
                    key = found
                    rows.extend((begin, 0, len(has_image)))
                    has_image.append(False)
                rows[-2] = -(-(start + size - rows[-3]) // BLOCK)
                has_image[-1] |= ending in endings
        return ShardIndex.of(np.array(rows, np.uint64).reshape(-1, 3), np.frombuffer(has_image, np.bool_))

    def place(self, entry: Entry, row: int) -> str:
        """The record."""
        return f":record {entry.number}"

    def open(self, path: Path, columns: Mapping[str, str]) -> _TarShard:
        """Open an archive."""
        return _TarShard(path, columns)
