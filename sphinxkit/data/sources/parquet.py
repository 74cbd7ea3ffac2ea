"""Parquet tables, read by row group through pyarrow (extra ``parquet``)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sphinxkit.data.samples import StoredImage
from sphinxkit.data.sources.base import ENTRY, Record, ShardIndex
from sphinxkit.errors import DataError

KEPT_GROUPS = 2  # row groups that a process holds of each shard; our choice
NAMES = ("image", "images", "text", "caption", "question", "answer", "conversations", "messages", "system", "task")
"""Columns that a record is made of, where the recipe maps no other."""


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("Parquet files need pyarrow: pip install 'sphinxkit[parquet]'") from error
    return pyarrow.parquet


def _open(path: Path) -> Any:
    parquet = _pyarrow()
    try:
        return parquet.ParquetFile(path, memory_map=True)
    except Exception as error:  # pyarrow raises errors of many kinds for damaged files
        raise DataError(f"{path}: damaged, cut off or no Parquet file: {error}") from error


class _ParquetShard:
    def __init__(self, path: Path, columns: Mapping[str, str]) -> None:
        self.path = path
        self.file = _open(path)
        known = self.file.schema_arrow.names
        for name, column in columns.items():
            if column not in known:
                raise DataError(f"{path}: no column {column!r} for {name!r}; it has: {', '.join(known)}")
        self.columns = {name: name for name in NAMES if name in known} | dict(columns)
        if not self.columns:
            raise DataError(f"{path}: no column of {', '.join(NAMES)}; map one (columns). It has: {', '.join(known)}")
        self.groups: OrderedDict[int, Any] = OrderedDict()

    def close(self) -> None:
        self.file.close()

    def read(self, offset: int, extent: int, number: int, row: int) -> Record:
        where = f"{self.path}:row {offset + row}"
        if number not in self.groups:
            try:
                table = self.file.read_row_group(number, columns=sorted(set(self.columns.values())))
            except Exception as error:  # as in ``_open``
                raise DataError(f"{where}: row group {number} cannot be read: {error}") from error
            self.groups[number] = {name: table.column(column) for name, column in self.columns.items()}
            if len(self.groups) > KEPT_GROUPS:
                self.groups.popitem(last=False)
        fields = {name: column[row].as_py() for name, column in self.groups[number].items()}
        if (image := fields.get("image")) is not None:
            fields["image"] = _image(image, where)
        return Record({name: value for name, value in fields.items() if value is not None}, where)


def _image(value: Any, where: str) -> Any:
    """Hugging Face's image columns are structs of bytes and path; plain ones are either."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    return StoredImage(f"{where} image", value) if isinstance(value, bytes) else value


class Parquet:
    """Parquet tables. A record with an image is not told from one without before it is read."""

    suffixes: tuple[str, ...] = (".parquet",)
    rows_per_entry: bool = True

    def scan(self, path: Path) -> ShardIndex:
        """Index the row groups: first row and number of rows."""
        with _open(path) as file:
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        starts = np.cumsum([0, *sizes])
        rows = [(int(starts[group]), size, group) for group, size in enumerate(sizes) if size]
        return ShardIndex(np.array(rows, ENTRY), np.array([], ENTRY))

    def open(self, path: Path, columns: Mapping[str, str]) -> _ParquetShard:
        """Open a table."""
        return _ParquetShard(path, columns)
