"""Finds the shards of a source and their format, and opens it."""

from __future__ import annotations

import glob
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sphinxkit.data.sources.index import FORMATS, IndexedSource, build_index
from sphinxkit.errors import DataError
from sphinxkit.registry import suggest

HEAD = 4096  # bytes that are looked at to tell a format; our choice
MAGICS = {
    b"PK\x03\x04": "zip archive",
    b"PAR1": "Parquet file",
    b"BZh": "bzip2 file",
    b"\xfd7zXZ": "xz file",
    b"\x1f\x8b": "gzip file",
    b"\x28\xb5\x2f\xfd": "zstd file",
}
UNPACK = {"gzip file": "gunzip -k", "zstd file": "zstd -d", "bzip2 file": "bunzip2 -k", "xz file": "unxz -k"}
SUFFIXES = {suffix: name for name, kind in FORMATS.items() for suffix in kind.suffixes}
COMPRESSED = (".gz", ".zst")


def find_shards(path: Path, format_name: str | None = None) -> list[Path]:
    """The files that a path means: itself, those of a folder, or those of a glob; sorted.

    Raises:
        DataError: There is none, or a folder holds several formats and none is named.
    """
    if path.is_dir():
        named = FORMATS.get(format_name or "")
        known = (*(SUFFIXES if named is None else named.suffixes), *COMPRESSED)
        found = sorted(file for file in path.iterdir() if file.suffix in known and not file.name.startswith("."))
        kinds = sorted({file.suffix for file in found})
        if format_name is None and len(kinds) > 1:
            raise DataError(f"{path}: the folder holds {', '.join(kinds)}; name a `format` or write a glob")
    elif glob.has_magic(str(path)) and not path.exists():
        found = sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207
    else:
        return [path]
    if not found:
        raise DataError(f"{path}: there are no files; expected {', '.join(SUFFIXES)}")
    return found


def find_format(shards: Sequence[Path], format_name: str | None = None) -> str:
    """The format of shards: the named one, else by their ending and first bytes.

    Raises:
        DataError: It is unknown, or a shard is another kind of file.
    """
    if format_name is not None and format_name not in FORMATS:
        raise DataError(
            f"unknown format {format_name!r}{suggest(format_name, FORMATS) or '.'} Known: {', '.join(FORMATS)}"
        )
    names = {format_name or _guess(shard) for shard in shards}
    if len(names) > 1:
        raise DataError(f"{shards[0].parent}: one source holds {' and '.join(sorted(names))}; make them several")
    name = names.pop()
    for shard in shards:
        _check(shard, name)
    return name


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(HEAD)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _guess(path: Path) -> str:
    if path.suffix == ".json" or path.suffix not in SUFFIXES:
        is_list = path.suffix == ".json" and _head(path).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        return "llava" if is_list else "jsonl"
    return SUFFIXES[path.suffix]


def _check(path: Path, name: str) -> None:
    """Refuse a file that begins like another format."""
    head = _head(path)
    kind = next((kind for magic, kind in MAGICS.items() if head.startswith(magic)), None)
    if kind is None and head[257:262] == b"ustar":
        kind = "tar archive"
    if kind in UNPACK:
        raise DataError(f"{path}: a {kind} cannot be read at any record; unpack it: {UNPACK[kind]} {path}")
    good = {"parquet": "Parquet file", "tar": "tar archive"}.get(name)
    if good is not None:
        if kind != good and not (name == "tar" and kind is None and head and not head.startswith((b"{", b"["))):
            raise DataError(f"{path}: expected a {good}, got {kind or 'something else'}: {head[:16]!r}")
        return
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        text = "" if error.start >= len(head) - 3 else "\0"  # a character may be cut off at the end
    if kind is not None or "\0" in text:
        wanted = "JSON lines" if name == "jsonl" else "a JSON list"
        raise DataError(f"{path}: expected {wanted}, got a {kind or 'binary file'}; name its `format` or convert it")


def open_source(
    path: str | Path, format_name: str | None = None, columns: Mapping[str, str] | None = None
) -> IndexedSource:
    """Open a source; its index is built if need be.

    Args:
        path: A file, a folder of shards, or a glob.
        format_name: ``jsonl``, ``llava``, ``tar`` or ``parquet``; None: by the ending.
        columns: Our names of a record's values (image, text, caption, question, answer, conversations, messages) -> the
            file's columns, keys, or in a tar endings of members.
    Raises:
        DataError: No such file, another format, damaged, without records, or without a column that is named.
    """
    shards = find_shards(Path(path), format_name)
    source = IndexedSource(build_index(shards, find_format(shards, format_name)), columns)
    if source.format.rows_per_entry:
        for number in range(len(shards)):
            source._shard(number)  # its columns are checked
        source.close()
    return source


@dataclass(frozen=True, slots=True)
class IndexReport:
    """Result of ``index_data``.

    Args:
        path: What was indexed.
        format: Its format.
        shards: Number of files.
        records: Number of records.
        file: The index.
        seconds: Time taken.
    """

    path: str
    format: str
    shards: int
    records: int
    file: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def index_data(path: str | Path, *, format: str | None = None, workers: int | None = None) -> IndexReport:
    """Build the index of a file, a folder of shards or a glob, so that runs start at once.

    Args:
        path: The file, folder or glob.
        format: A key of ``FORMATS``; None: by the ending.
        workers: Processes; None: one for each core if the shards are large.
    Raises:
        DataError: As ``build_index``; or the format is unknown.
    """
    begin = time.perf_counter()
    shards = find_shards(Path(path), format)
    name = find_format(shards, format)
    source = IndexedSource(build_index(shards, name, workers))
    seconds = time.perf_counter() - begin
    return IndexReport(str(path), name, len(shards), len(source), str(source.index), seconds)
