"""The protocol of sources, and what a format says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from sphinxkit.errors import DataError

ENTRY = np.dtype([("offset", "<u8"), ("extent", "<u4"), ("number", "<u4")])
"""The 16 bytes of an entry; see ``Entry``."""


class Entry(NamedTuple):
    """What the index holds of a record, or of a run of rows.

    Args:
        offset: Where it begins in its shard: a byte, or a row.
        extent: A number of the format's own: a length, or the line.
        number: Its number in the shard, or its row group's.
    """

    offset: int
    extent: int
    number: int


@dataclass(frozen=True, slots=True)
class Record:
    """One record.

    Args:
        fields: Its values by name. ``image`` is a path or a ``StoredImage``.
        where: Shard and place, for messages.
    """

    fields: Mapping[str, Any]
    where: str


class Source(Protocol):
    """Records by number. It can be pickled, and any process opens it by itself."""

    def __len__(self) -> int:
        """Number of records."""
        ...

    def read(self, index: int) -> Record:
        """One record; raises ``DataError``, with shard and place, where it cannot be used."""
        ...


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """What the index keeps of one shard.

    Args:
        images: Entries of records with an image, in the shard's order.
        texts: Entries of records without one.
    """

    images: NDArray[Any]
    texts: NDArray[Any]

    @classmethod
    def of(cls, columns: NDArray[np.uint64], has_image: NDArray[np.bool_]) -> ShardIndex:
        """From (N, 3) offsets, extents and numbers, and (N,) whether each has an image."""
        entries = np.empty(len(columns), ENTRY)
        for place, name in enumerate(Entry._fields):
            entries[name] = columns[:, place]
        return cls(entries[has_image], entries[~has_image])


class Format(Protocol):
    """A file format: how its shards are indexed and read."""

    suffixes: tuple[str, ...]
    """Endings that name the format."""

    rows_per_entry: bool
    """Whether an entry is a run of records: ``extent`` of them, the first of which is record ``offset``."""

    max_open: int
    """Shards that a process keeps open."""

    def scan(self, path: Path, image: str) -> ShardIndex:
        """Index a shard, whose images are in the column, key or ending ``image``.

        Raises ``DataError`` if the shard is damaged or of another format.
        """
        ...

    def place(self, entry: Entry, row: int) -> str:
        """Names a record within its shard, for messages."""
        ...

    def open(self, path: Path, columns: Mapping[str, str]) -> Shard:
        """Open a shard; raises ``DataError`` if it has no such columns."""
        ...


class Shard(Protocol):
    """An open shard."""

    def read(self, entry: Entry, row: int, where: str) -> Mapping[str, Any]:
        """The values of a record; ``row`` counts within a run of rows."""
        ...

    def close(self) -> None:
        """Close it."""
        ...


@dataclass(frozen=True, slots=True)
class ShardStamp:
    """A shard as it was indexed: path, size and time."""

    path: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> ShardStamp:
        """The file's; raises ``DataError`` where there is none."""
        try:
            stat = path.stat()
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        return cls(str(path.absolute()), stat.st_size, stat.st_mtime_ns)

    def check(self) -> None:
        """Raise ``ShardChangedError`` unless size and time are still those."""
        try:
            found = ShardStamp.of(Path(self.path))
        except DataError as error:
            raise ShardChangedError(f"{error} (it was there when it was indexed)") from error
        if found != self:
            raise ShardChangedError(
                f"{self.path}: the file has changed or been cut since it was indexed (it had {self.size} bytes, now "
                f"{found.size}); put the old one back, or start again: a new start indexes it anew"
            )


class ShardChangedError(DataError):
    """A shard is not the one that was indexed; a run stops at it."""
