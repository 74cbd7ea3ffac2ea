from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sphinxkit.data.permutation import Permutation, block_permutation, derive_key, interleave
from sphinxkit.errors import DataError


@given(st.integers(1, 300), st.integers(0, 2**64 - 1))
def test_every_index_once(size: int, key: int) -> None:
    permutation = Permutation(size, key)
    assert sorted(map(permutation, range(size))) == list(range(size))


def test_the_order_never_changes() -> None:
    """Pinned: a run must be resumable with a later version."""
    assert [Permutation(10, 1)(index) for index in range(10)] == PINNED
    assert derive_key(0, 1, "batches") == PINNED_KEY


def test_all_permutations_of_three_are_about_equally_frequent() -> None:
    count = Counter(tuple(map(Permutation(3, derive_key(key)), range(3))) for key in range(1200))
    assert len(count) == 6
    # 200 expected, standard deviation 12.9; five of them
    assert all(abs(value - 200) < 65 for value in count.values())


def test_first_places_are_about_uniform() -> None:
    count = Counter(Permutation(1000, derive_key("u", key))(0) // 100 for key in range(2000))
    assert all(abs(value - 200) < 67 for value in count.values())


def test_large_sizes_cost_nothing_up_front() -> None:
    permutation = Permutation(10**15, 3)
    assert len({permutation(index) for index in range(1000)}) == 1000


def test_out_of_range() -> None:
    with pytest.raises(DataError, match=r"permutation: index 3 is outside range\(3\)"):
        Permutation(3, 0)(3)
    with pytest.raises(DataError, match="index -1"):
        Permutation(3, 0)(-1)


PINNED = [9, 4, 7, 8, 1, 6, 2, 0, 5, 3]
PINNED_KEY = 0x669D1E32E6034D8


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 2**64 - 1))
def test_blocks_stay_together(size: int, block: int, key: int) -> None:
    order = [block_permutation(size, block, key, index) for index in range(size)]
    assert sorted(order) == list(range(size))
    for start in range(0, size, block):
        assert len({index // block for index in order[start : start + block]}) == 1


def test_block_permutations_shuffle_blocks_and_their_inside() -> None:
    order = [block_permutation(64, 8, 5, index) for index in range(64)]
    assert [index // 8 for index in order[::8]] != list(range(8))
    assert any(order[start : start + 8] != sorted(order[start : start + 8]) for start in range(0, 64, 8))


@given(st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(any))
def test_interleaving_is_even(counts: list[int]) -> None:
    total = sum(counts)
    merged = [interleave(counts, index) for index in range(total)]
    assert sorted(merged) == [(member, place) for member, count in enumerate(counts) for place in range(count)]
    for member, count in enumerate(counts):
        seen = 0
        for index, (found, place) in enumerate(merged, 1):
            if found == member:
                assert place == seen
                seen += 1
            assert abs(seen - index * count / total) <= len(counts).bit_length()
