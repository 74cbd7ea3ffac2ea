"""Indexes of sources: built once, memory-mapped, shared by all processes of a machine."""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple
from itertools import accumulate, repeat
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sphinxkit.atomic import atomic_file
from sphinxkit.data.sources.base import ENTRY, Entry, Format, Record, Shard, ShardChangedError, ShardIndex, ShardStamp
from sphinxkit.data.sources.jsonl import JsonLines, JsonList
from sphinxkit.data.sources.kinds import check_kind
from sphinxkit.data.sources.parquet import Parquet
from sphinxkit.data.sources.tar import Tar
from sphinxkit.errors import DataError

FORMATS: Mapping[str, Format] = {"jsonl": JsonLines(), "llava": JsonList(), "parquet": Parquet(), "tar": Tar()}
CACHE_VARIABLE = "SPHINXKIT_CACHE"
VERSION = 1  # of the index files
PARALLEL_BYTES = 1 << 26  # of shards above which more processes are worth their start; our choice

Part = Literal["all", "images", "texts"]


def cache_folder() -> Path:
    """Where indexes are kept: ``$SPHINXKIT_CACHE/indexes``, by default ``~/.cache/sphinxkit/indexes``."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sphinxkit"
    return Path(os.environ.get(CACHE_VARIABLE) or default) / "indexes"


def _digest(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def build_index(shards: Sequence[Path], format_name: str, image: str = "image", workers: int | None = None) -> Path:
    """The index of shards, built if there is none of these sizes and times.

    The first process builds it, the others wait for it. Its name tells the shards, their sizes and times, so it never
    changes; the one that it takes the place of is deleted.

    Args:
        shards: Files of one format.
        format_name: A key of ``FORMATS``.
        image: The column, key or ending of images.
        workers: Processes that read shards; None: one for each core if the shards are large.
    Returns:
        The index file.
    Raises:
        DataError: A shard is damaged, cut off or of another format, there are no records, or the cache cannot be
            written.
        ShardChangedError: A shard changes meanwhile.
    """
    stamps = [ShardStamp.of(shard) for shard in shards]
    source = _digest(VERSION, format_name, image, [stamp.path for stamp in stamps])
    path = cache_folder() / f"{source}-{_digest(stamps)}.index"
    if path.exists():
        return path
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if sum(stamp.size for stamp in stamps) > PARALLEL_BYTES else 1
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f"{source}.lock")):
            if not path.exists():
                _write(path, format_name, image, stamps, workers)
                for old in path.parent.glob(f"{source}-*.index"):
                    if old != path:
                        old.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{path}: the index cannot be written ({error.strerror}); set {CACHE_VARIABLE}") from error
    return path


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _scan(format_name: str, image: str, stamp: ShardStamp) -> ShardIndex:
    path = Path(stamp.path)
    check_kind(path, format_name)
    try:
        found = FORMATS[format_name].scan(path, image)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    stamp.check()
    return found


def _scan_all(format_name: str, image: str, stamps: Sequence[ShardStamp], workers: int) -> Iterator[ShardIndex]:
    arguments = repeat(format_name), repeat(image), stamps
    if workers < 2 or len(stamps) < 2:
        yield from map(_scan, *arguments)
        return
    with ProcessPoolExecutor(min(workers, len(stamps)), multiprocessing.get_context("fork")) as pool:
        yield from pool.map(_scan, *arguments)


def _write(path: Path, format_name: str, image: str, stamps: Sequence[ShardStamp], workers: int) -> None:
    found = list(_scan_all(format_name, image, stamps, workers))
    counts = [(len(shard.images), len(shard.texts)) for shard in found]
    if not sum(map(sum, counts)):
        raise DataError(f"{', '.join(stamp.path for stamp in stamps[:3])}: no records")
    sizes = list(map(sum, counts))
    if FORMATS[format_name].rows_per_entry:
        sizes = [int(shard.images["extent"].sum() + shard.texts["extent"].sum()) for shard in found]
    shards = [astuple(stamp) for stamp in stamps]
    encoded = json.dumps({"format": format_name, "shards": shards, "counts": counts, "sizes": sizes}).encode()
    encoded += b" " * (-(len(encoded) + 8) % ENTRY.itemsize)
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for shard in found:
            file.write(shard.images.tobytes())
        for shard in found:
            file.write(shard.texts.tobytes())


class IndexedSource:
    """The records of an index, or its records of one type.

    Args:
        index: The index file.
        columns: Our names of values -> the files' names.
        part: Which records: those with an image, those without, or all (first those with an image).
    Raises:
        ShardChangedError: The index is gone: another process has indexed changed shards.
    """

    def __init__(self, index: Path, columns: Mapping[str, str] | None = None, part: Part = "all") -> None:
        self.index, self.columns, self.part = index, dict(columns or {}), part
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._pid = os.getpid()
        try:
            with index.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
                images, texts = zip(*header["counts"], strict=True)
                entries = np.memmap(file, ENTRY, "r", 8 + length, (sum(images) + sum(texts),))
        except FileNotFoundError as error:
            raise ShardChangedError(
                f"{index}: the index is gone; its files have changed and were indexed anew"
            ) from error
        self.format = FORMATS[header["format"]]
        self._stamps = [ShardStamp(*row) for row in header["shards"]]
        chosen = {"all": slice(None), "images": slice(sum(images)), "texts": slice(sum(images), None)}[part]
        self._entries = entries[chosen]
        self._shard_ends = list(accumulate({"all": (*images, *texts), "images": images, "texts": texts}[part]))
        self._run_ends = None
        if self.format.rows_per_entry:
            self._run_ends = np.cumsum(self._entries["extent"], dtype=np.int64)
        self._firsts: list[int] = [0, *accumulate(header["sizes"])]  # number of each shard's first record

    def __reduce__(self) -> tuple[Any, ...]:
        return IndexedSource, (self.index, self.columns, self.part)

    def __del__(self) -> None:
        self.close()

    def __len__(self) -> int:
        if self._run_ends is None or not len(self._run_ends):
            return len(self._entries)
        return int(self._run_ends[-1])

    @property
    def shards(self) -> list[Path]:
        """The files."""
        return [Path(stamp.path) for stamp in self._stamps]

    @property
    def is_raw(self) -> bool:
        """Whether conversations may need ``trim_turns``: not those of JSON lines, which ``convert-data`` writes."""
        return self.format is not FORMATS["jsonl"]

    def _locate(self, index: int) -> tuple[int, Entry, int]:
        """(shard, entry, row within the entry)."""
        place, row = index, 0
        if self._run_ends is not None:
            place = int(np.searchsorted(self._run_ends, index, "right"))
            row = index - (int(self._run_ends[place - 1]) if place else 0)
        return bisect_right(self._shard_ends, place) % len(self._stamps), Entry(*self._entries[place].item()), row

    def number(self, index: int) -> int:
        """A record's number in the whole source, in the order of the files."""
        shard, entry, row = self._locate(index)
        return self._firsts[shard] + (entry.offset + row if self.format.rows_per_entry else entry.number)

    def where(self, index: int) -> str:
        """File and place of a record, for messages."""
        shard, entry, row = self._locate(index)
        return self._stamps[shard].path + self.format.place(entry, row)

    def read(self, index: int) -> Record:
        """One record.

        Raises:
            DataError: It cannot be read.
            ShardChangedError: Its file has changed since it was indexed.
        """
        shard, entry, row = self._locate(index)
        where = self._stamps[shard].path + self.format.place(entry, row)
        try:
            return Record(self._shard(shard).read(entry, row, where), where)
        except (DataError, OSError) as error:
            self._stamps[shard].check()
            if isinstance(error, DataError):
                raise
            raise DataError(f"{where}: cannot be read: {error.strerror}") from error

    def check_columns(self) -> None:
        """Open the first file; raises ``DataError`` if it lacks a column."""
        self._shard(0)
        self.close()

    def _shard(self, number: int) -> Shard:
        if self._pid != os.getpid():  # a forked process shares no file positions
            self.close()
            self._pid = os.getpid()
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        stamp = self._stamps[number]
        stamp.check()
        while len(self._open) >= self.format.max_open:
            self._open.popitem(last=False)[1].close()
        self._open[number] = self.format.open(Path(stamp.path), self.columns)
        return self._open[number]

    def close(self) -> None:
        """Close the files; they are opened again when they are needed."""
        while getattr(self, "_open", None):
            self._open.popitem()[1].close()

    def split(self) -> list[tuple[Literal["image-text", "text"], IndexedSource]]:
        """The records of each type that there are."""
        parts: tuple[tuple[Literal["image-text", "text"], Part], ...] = (("image-text", "images"), ("text", "texts"))
        found = [(kind, IndexedSource(self.index, self.columns, part)) for kind, part in parts]
        return [(kind, source) for kind, source in found if len(source)]
