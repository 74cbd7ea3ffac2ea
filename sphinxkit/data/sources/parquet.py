"""Parquet tables, read by row group through pyarrow (extra ``parquet``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sphinxkit.data.samples import StoredImage
from sphinxkit.data.sources.base import Entry, ShardIndex
from sphinxkit.errors import DataError

NAMES = ("image", "images", "text", "caption", "question", "answer", "conversations", "messages", "system", "task")
"""Columns that a record is made of, where the recipe maps no other."""


def _open(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("Parquet files need pyarrow: pip install 'sphinxkit[parquet]'") from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except Exception as error:  # pyarrow raises errors of many kinds for damaged files
        raise DataError(f"{path}: damaged, cut off or no Parquet file: {error}") from error


def _group_sizes(file: Any) -> list[int]:
    return [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]


def _read_group(file: Any, group: int, columns: list[str], where: str) -> Any:
    try:
        return file.read_row_group(group, columns=columns, use_threads=False)
    except Exception as error:  # as in ``_open``
        raise DataError(f"{where}: row group {group} cannot be read: {error}") from error


class _ParquetShard:
    def __init__(self, path: Path, columns: Mapping[str, str]) -> None:
        self.file = _open(path)
        known = self.file.schema_arrow.names
        for name, column in columns.items():
            if column not in known:
                raise DataError(f"{path}: no column {column!r} for {name!r}; it has: {', '.join(known)}")
        self.columns = {name: name for name in NAMES if name in known} | dict(columns)
        if not self.columns:
            raise DataError(f"{path}: no column of {', '.join(NAMES)}; map one (columns). It has: {', '.join(known)}")
        self.starts = np.cumsum([0, *_group_sizes(self.file)])
        self.group, self.table = -1, dict[str, Any]()  # the row group that was read last, by our names

    def close(self) -> None:
        self.file.close()

    def read(self, entry: Entry, row: int, where: str) -> Mapping[str, Any]:
        group = entry.number
        if group != self.group:
            table = _read_group(self.file, group, sorted(set(self.columns.values())), where)
            self.table = {name: table.column(column) for name, column in self.columns.items()}
            self.group = group
        place = entry.offset + row - int(self.starts[group])
        fields = {name: column[place].as_py() for name, column in self.table.items()}
        for name in ("image", "images"):
            if fields.get(name) is not None:
                fields[name] = _image(fields[name], where)
        if isinstance(fields.get("images"), StoredImage):
            fields["image"] = fields.pop("images")
        return {name: value for name, value in fields.items() if value is not None}


def _image(value: Any, where: str) -> Any:
    """Hugging Face's image columns are structs of bytes and path, or lists of them; plain ones are either."""
    if isinstance(value, list) and len(value) == 1:
        return _image(value[0], where)
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    return StoredImage(f"{where} image", value) if isinstance(value, bytes) else value


def _image_mask(file: Any, group: int, image: str, path: Path) -> Any:
    """(rows,) whether each row of a group has an image; the column is read only where its statistics do not tell."""
    rows = file.metadata.row_group(group)
    leaves = [rows.column(number) for number in range(rows.num_columns)]
    leaves = [leaf for leaf in leaves if leaf.path_in_schema.split(".")[0] == image]
    nulls = [None if leaf.statistics is None else leaf.statistics.null_count for leaf in leaves]
    if all(count == rows.num_rows for count in nulls):
        return np.zeros(rows.num_rows, np.bool_)
    if 0 in nulls and "string" not in str(file.schema_arrow.field(image).type)[:12]:  # a path may be empty
        return np.ones(rows.num_rows, np.bool_)
    smallest = min(leaves, key=lambda leaf: int(leaf.total_compressed_size))
    column = _read_group(file, group, [smallest.path_in_schema], str(path)).column(image).to_pylist()
    return np.array([isinstance(value, dict) or bool(value) for value in column], np.bool_)


def _runs(mask: Any) -> Iterator[tuple[int, int]]:
    """(start, length) of the runs of equal values."""
    ends = [*(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(mask)]
    start = 0
    for end in ends:
        yield start, end - start
        start = end


class Parquet:
    """Parquet tables. An entry is a run of rows of one group that all have an image, or none."""

    suffixes: tuple[str, ...] = (".parquet",)
    rows_per_entry: bool = True
    max_open: int = 4  # each holds the values of a row group; our choice

    def scan(self, path: Path, image: str) -> ShardIndex:
        """Index the row groups."""
        rows: list[tuple[int, int, int]] = []
        has_image: list[bool] = []
        first = 0
        with _open(path) as file:
            names = file.schema_arrow.names
            column = image if image in names else "images"
            for group in range(file.metadata.num_row_groups):
                mask = _image_mask(file, group, column, path)
                for start, length in _runs(mask) if len(mask) else ():
                    rows.append((first + start, length, group))
                    has_image.append(bool(mask[start]))
                first += len(mask)
        return ShardIndex.of(np.array(rows, np.uint64).reshape(-1, 3), np.array(has_image, np.bool_))

    def place(self, entry: Entry, row: int) -> str:
        """The row."""
        return f":row {entry.offset + row}"

    def open(self, path: Path, columns: Mapping[str, str]) -> _ParquetShard:
        """Open a table."""
        return _ParquetShard(path, columns)
