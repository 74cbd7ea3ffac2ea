"""The protocol of sources, and what a format says of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sphinxkit.errors import DataError

ENTRY = np.dtype([("offset", "<u8"), ("extent", "<u4"), ("number", "<u4")])
"""16 bytes of the index: where a record begins in its shard, a number of the format's own, and its number there."""


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
    def of(cls, rows: Sequence[tuple[int, int, int]], has_image: Sequence[bool]) -> ShardIndex:
        """From rows of ``ENTRY`` and whether each has an image."""
        entries, mask = np.array(rows, ENTRY), np.array(has_image, bool)
        return cls(entries[mask], entries[~mask])


class Format(Protocol):
    """A file format: how its shards are indexed and read."""

    suffixes: tuple[str, ...]
    """Endings that name the format."""

    rows_per_entry: bool
    """Whether an entry is a block of records: ``extent`` of them, the first of which is record ``offset``."""

    def scan(self, path: Path) -> ShardIndex:
        """Index a shard; raises ``DataError`` if it is damaged or of another format."""
        ...

    def open(self, path: Path, columns: Mapping[str, str]) -> Shard:
        """Open a shard."""
        ...


class Shard(Protocol):
    """An open shard."""

    def read(self, offset: int, extent: int, number: int, row: int) -> Record:
        """The record of an entry; ``row`` counts within a block."""
        ...

    def close(self) -> None:
        """Close it."""
        ...


@dataclass(frozen=True, slots=True)
class ShardStamp:
    """A shard as it was indexed: path, size and time, and its numbers of records with and without image."""

    path: str
    size: int
    mtime_ns: int
    images: int = 0
    texts: int = 0

    def is_current(self) -> bool:
        """Whether size and time are still those."""
        try:
            stat = Path(self.path).stat()
        except OSError:
            return False
        return (stat.st_size, stat.st_mtime_ns) == (self.size, self.mtime_ns)


class ShardChangedError(DataError):
    """A shard is not the one that was indexed; a run stops at it."""
