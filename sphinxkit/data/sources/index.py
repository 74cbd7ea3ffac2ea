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
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sphinxkit.atomic import atomic_file
from sphinxkit.data.sources.base import ENTRY, Format, Record, Shard, ShardChangedError, ShardIndex, ShardStamp
from sphinxkit.data.sources.jsonl import JsonLines, JsonList
from sphinxkit.data.sources.parquet import Parquet
from sphinxkit.data.sources.tar import Tar
from sphinxkit.errors import DataError

FORMATS: Mapping[str, Format] = {"jsonl": JsonLines(), "llava": JsonList(), "parquet": Parquet(), "tar": Tar()}
CACHE_VARIABLE = "SPHINXKIT_CACHE"
VERSION = 1  # of the index files
PARALLEL_BYTES = 1 << 26  # data of one shard after which more processes are worth their start; our choice
MAX_OPEN = 64  # shards that a process keeps open; our choice

Part = Literal["all", "images", "texts"]


def cache_folder() -> Path:
    """Where indexes are kept: ``$SPHINXKIT_CACHE/indexes``, by default ``~/.cache/sphinxkit/indexes``."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sphinxkit"
    return Path(os.environ.get(CACHE_VARIABLE) or default) / "indexes"


def _stamp(path: Path) -> ShardStamp:
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return ShardStamp(str(path.absolute()), stat.st_size, stat.st_mtime_ns)


def _scan(format_name: str, path: Path) -> tuple[ShardStamp, ShardIndex]:
    before = _stamp(path)
    try:
        found = FORMATS[format_name].scan(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if not before.is_current():
        raise ShardChangedError(f"{path}: the file changed while it was indexed")
    images, texts = len(found.images), len(found.texts)
    return ShardStamp(before.path, before.size, before.mtime_ns, images, texts), found


def _scan_all(format_name: str, shards: Sequence[Path], workers: int) -> Iterator[tuple[ShardStamp, ShardIndex]]:
    names = [format_name] * len(shards)
    if workers < 2 or len(shards) < 2:
        yield from map(_scan, names, shards)
        return
    with ProcessPoolExecutor(min(workers, len(shards)), multiprocessing.get_context("fork")) as pool:
        yield from pool.map(_scan, names, shards)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read_header(path: Path) -> tuple[str, list[ShardStamp], int]:
    """Format, shards and where the entries begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return header["format"], [ShardStamp(*row) for row in header["shards"]], 8 + length


def _is_current(path: Path, shards: Sequence[Path]) -> bool:
    try:
        found = _read_header(path)[1]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return [stamp.path for stamp in found] == [str(p.absolute()) for p in shards] and all(
        stamp.is_current() for stamp in found
    )


def build_index(shards: Sequence[Path], format_name: str, workers: int | None = None) -> Path:
    """The index of shards; built if there is none or if the size or time of a shard has changed.

    The first process builds it, the others wait for it.

    Args:
        shards: Files of one format.
        format_name: A key of ``FORMATS``.
        workers: Processes that read shards; None: one for each core if the shards are large.
    Returns:
        The index file.
    Raises:
        DataError: A shard is damaged, cut off or of another format, there are no records, or the cache cannot be
            written.
    """
    key = hashlib.blake2b(repr((VERSION, format_name, [str(p.absolute()) for p in shards])).encode(), digest_size=16)
    path = cache_folder() / f"{key.hexdigest()}.index"
    if _is_current(path, shards):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            if not _is_current(path, shards):
                if workers is None:
                    is_large = sum(_stamp(shard).size for shard in shards) > PARALLEL_BYTES
                    workers = len(os.sched_getaffinity(0)) if is_large else 1
                _write(path, format_name, shards, workers)
    except OSError as error:
        raise DataError(f"{path}: the index cannot be written ({error.strerror}); set {CACHE_VARIABLE}") from error
    return path


def _write(path: Path, format_name: str, shards: Sequence[Path], workers: int) -> None:
    stamps: list[ShardStamp] = []
    texts: list[Any] = []
    images: list[Any] = []
    for stamp, found in _scan_all(format_name, shards, workers):
        stamps.append(stamp)
        images.append(found.images)
        texts.append(found.texts)
    if not any(stamp.images + stamp.texts for stamp in stamps):
        raise DataError(f"{', '.join(map(str, shards[:3]))}: no records")
    header = json.dumps({"format": format_name, "shards": [astuple(stamp) for stamp in stamps]}).encode()
    header += b" " * (-(len(header) + 8) % ENTRY.itemsize)
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for entries in (*images, *texts):
            file.write(entries.tobytes())


class IndexedSource:
    """The records of an index, or its records of one type.

    Args:
        index: The index file.
        columns: Our names of values -> the files' names.
        part: Which records: those with an image, those without, or all (first those with an image).
    """

    def __init__(self, index: Path, columns: Mapping[str, str] | None = None, part: Part = "all") -> None:
        self.index, self.columns, self.part = index, dict(columns or {}), part
        name, self._stamps, begin = _read_header(index)
        self.format = FORMATS[name]
        sizes = [stamp.images for stamp in self._stamps], [stamp.texts for stamp in self._stamps]
        entries = np.memmap(index, ENTRY, "r", begin, (sum(map(sum, sizes)),))
        first = sum(sizes[0])
        self._entries = {"all": entries, "images": entries[:first], "texts": entries[first:]}[part]
        chosen = {"all": (*sizes[0], *sizes[1]), "images": sizes[0], "texts": sizes[1]}[part]
        self._shard_ends = list(accumulate(chosen))
        is_blocks = self.format.rows_per_entry
        self._block_ends = np.cumsum(self._entries["extent"], dtype=np.int64) if is_blocks else None
        counts = [stamp.images + stamp.texts for stamp in self._stamps]
        if is_blocks:
            entry_ends = [0, *accumulate(counts)]
            every = np.concatenate([[0], np.cumsum(entries["extent"], dtype=np.int64)])
            self._bases = [int(every[end]) for end in entry_ends[:-1]]
        else:
            self._bases = [0, *accumulate(counts)][:-1]
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._pid = os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        return IndexedSource, (self.index, self.columns, self.part)

    def __del__(self) -> None:
        self.close()

    def __len__(self) -> int:
        return int(self._block_ends[-1]) if self._block_ends is not None else len(self._entries)

    @property
    def shards(self) -> list[Path]:
        """The files."""
        return [Path(stamp.path) for stamp in self._stamps]

    def _locate(self, index: int) -> tuple[int, Any, int]:
        """(shard, entry, row within the entry)."""
        entry, row = index, 0
        if self._block_ends is not None:
            entry = int(np.searchsorted(self._block_ends, index, "right"))
            row = index - (int(self._block_ends[entry - 1]) if entry else 0)
        return bisect_right(self._shard_ends, entry) % len(self._stamps), self._entries[entry], row

    def number(self, index: int) -> int:
        """A record's number in the whole source, in the order of the files."""
        shard, entry, row = self._locate(index)
        return self._bases[shard] + (int(entry["offset"]) + row if self.format.rows_per_entry else int(entry["number"]))

    def read(self, index: int) -> Record:
        """One record.

        Raises:
            DataError: It cannot be read.
            ShardChangedError: Its file has changed since it was indexed.
        """
        number, entry, row = self._locate(index)
        return self._shard(number).read(int(entry["offset"]), int(entry["extent"]), int(entry["number"]), row)

    def where(self, index: int) -> str:
        """File and number of a record, for messages."""
        shard, entry, _ = self._locate(index)
        is_lines = isinstance(self.format, JsonLines)
        return f"{self._stamps[shard].path}:{entry['extent'] if is_lines else self.number(index) - self._bases[shard]}"

    def _shard(self, number: int) -> Shard:
        if self._pid != os.getpid():  # a forked process shares no file positions
            self.close()
            self._pid = os.getpid()
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        stamp = self._stamps[number]
        if not stamp.is_current():
            raise ShardChangedError(
                f"{stamp.path}: the file has changed or been cut since it was indexed (it had {stamp.size} bytes); put "
                "the old one back, or start again: a new start indexes it anew"
            )
        self._open[number] = self.format.open(Path(stamp.path), self.columns)
        if len(self._open) > MAX_OPEN:
            self._open.popitem(last=False)[1].close()
        return self._open[number]

    def close(self) -> None:
        """Close the files; they are opened again when they are needed."""
        while getattr(self, "_open", None):
            self._open.popitem()[1].close()

    def split(self) -> list[tuple[Literal["image-text", "text"], IndexedSource]]:
        """The records of each type that there are; of Parquet, which does not tell, all are ``image-text``."""
        parts: tuple[tuple[Literal["image-text", "text"], Part], ...] = (("image-text", "images"), ("text", "texts"))
        found = [(kind, IndexedSource(self.index, self.columns, part)) for kind, part in parts]
        return [(kind, source) for kind, source in found if len(source._entries)]
