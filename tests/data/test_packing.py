from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sphinxkit.data.packing import fill_rate, pack
from sphinxkit.errors import DataError


def test_hand_made() -> None:
    # by length: 6, 5, 4, 3, 2 into rows of 10: 6+4, 5+3+2
    assert pack([5, 3, 6, 2, 4], 10) == [[0, 1, 3], [2, 4]]
    assert fill_rate([5, 3, 6, 2, 4], [[0, 1, 3], [2, 4]], 10) == 1.0
    assert fill_rate([5], [[0]], 10) == 0.5
    assert pack([], 10) == []
    assert fill_rate([], [], 10) == 1.0


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120))
def test_every_sample_once_and_no_row_too_long(lengths: list[int], capacity: int) -> None:
    rows = pack(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= capacity for row in rows)
    assert rows == pack(lengths, capacity)
    # two rows that are both at most half full would have been one
    assert sum(sum(lengths[index] for index in row) * 2 <= capacity for row in rows) <= 1


@pytest.mark.parametrize(("lengths", "found"), [([3, 11], "sample 1 has 11"), ([0], "sample 0 has 0")])
def test_lengths_that_do_not_fit(lengths: list[int], found: str) -> None:
    with pytest.raises(DataError, match=f"{found} tokens, a row holds 1 to 10"):
        pack(lengths, 10)
