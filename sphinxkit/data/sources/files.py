"""Finds the shards of a source and their format, and opens it."""

from __future__ import annotations

import glob
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sphinxkit.data.sources.index import FORMATS, IndexedSource, build_index
from sphinxkit.data.sources.kinds import read_head
from sphinxkit.errors import DataError
from sphinxkit.registry import suggest

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
    """The format of shards: the named one, else by their endings; ``.json`` is a list or lines by its first byte.

    Raises:
        DataError: It is unknown, or they have several.
    """
    if format_name is not None and format_name not in FORMATS:
        raise DataError(
            f"unknown format {format_name!r}{suggest(format_name, FORMATS) or '.'} Known: {', '.join(FORMATS)}"
        )
    names = {format_name or _guess(shard) for shard in shards}
    if len(names) > 1:
        raise DataError(f"{shards[0].parent}: one source holds {' and '.join(sorted(names))}; make them several")
    return names.pop()


def _guess(path: Path) -> str:
    if path.suffix == ".json":
        return "llava" if read_head(path).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[") else "jsonl"
    return SUFFIXES.get(path.suffix, "jsonl")


def open_source(
    path: str | Path,
    format_name: str | None = None,
    columns: Mapping[str, str] | None = None,
    workers: int | None = None,
) -> IndexedSource:
    """Open a source; its index is built if need be.

    Args:
        path: A file, a folder of shards, or a glob.
        format_name: ``jsonl``, ``llava``, ``tar`` or ``parquet``; None: by the ending.
        columns: Our names of a record's values (image, text, caption, question, answer, conversations, messages) -> the
            file's columns, keys, or in a tar endings of members.
        workers: See ``build_index``.
    Raises:
        DataError: No such file, another format, damaged, without records, or without a column that is named.
    """
    shards = find_shards(Path(path), format_name)
    image = (columns or {}).get("image", "image")
    source = IndexedSource(build_index(shards, find_format(shards, format_name), image, workers), columns)
    source.check_columns()
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


def index_data(
    path: str | Path,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    workers: int | None = None,
) -> IndexReport:
    """Build the index of a file, a folder of shards or a glob, so that runs start at once.

    Args:
        path: The file, folder or glob.
        format: ``jsonl``, ``llava``, ``tar`` or ``parquet``; None: by the ending.
        columns: As in the mixture.
        workers: Processes; None: one for each core if the shards are large.
    Raises:
        DataError: As ``open_source``.
    """
    begin = time.perf_counter()
    source = open_source(path, format, columns, workers)
    seconds = time.perf_counter() - begin
    name = next(name for name, kind in FORMATS.items() if kind is source.format)
    return IndexReport(str(path), name, len(source.shards), len(source), str(source.index), seconds)
