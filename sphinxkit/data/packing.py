"""Bin packing: samples of variable lengths into rows of fixed capacity, with little padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from sphinxkit.errors import DataError


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack samples into rows by best-fit decreasing: the longest first, each into the fullest row with room.

    The result depends only on the lengths and their order. It is never worse than 11/9 of the optimum plus 6/9 of a
    row (Johnson 1974; Dosa 2007 for first-fit decreasing, whose bound best-fit shares).

    Args:
        lengths: Tokens of each sample, image tokens included.
        capacity: Tokens per row.
    Returns:
        Rows of indices into ``lengths``; in each, and among the rows by their first member, in the samples' order.
    Raises:
        DataError: A length is not positive or does not fit a row.
    """
    for index, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise DataError(f"packing: sample {index} has {length} tokens, a row holds 1 to {capacity}")
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        place = bisect_left(room, (lengths[index], -1))
        if place == len(room):
            left, row = capacity, len(rows)
            rows.append([])
        else:
            left, row = room.pop(place)
        rows[row].append(index)
        insort(room, (left - lengths[index], row))
    return sorted(sorted(row) for row in rows)


def fill_rate(lengths: Sequence[int], rows: Sequence[Sequence[int]], capacity: int) -> float:
    """Fraction of the rows' capacity in use, in [0, 1]; 1 if there are no rows.

    Args:
        lengths: Tokens of each sample.
        rows: Result of ``pack``.
        capacity: Tokens per row.
    """
    return sum(lengths[index] for row in rows for index in row) / (capacity * len(rows)) if rows else 1.0
