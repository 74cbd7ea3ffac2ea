from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from sphinxkit.data.permutation import SPLITMIX64_GAMMA, splitmix64
from sphinxkit.errors import DataError
from sphinxkit.nano.world.rng import Rng, random_bytes

# The first numbers of splitmix64 from state 1234567, as published with its reference implementation (Vigna, 2015).
SPLITMIX_1234567 = (
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
)
# Rng in a bin of ten thousand vary by about 100 (one standard deviation, 90 to 100); six of them.
BIN_SLACK = 600


def test_numbers_are_splitmix64() -> None:
    assert tuple(splitmix64((1234567 + n * SPLITMIX64_GAMMA) % 2**64) for n in range(1, 6)) == SPLITMIX_1234567


def test_bytes_are_the_same_numbers_lowest_byte_first() -> None:
    expected = b"".join(number.to_bytes(8, "little") for number in SPLITMIX_1234567)
    assert random_bytes(1234567, 40).tobytes() == expected
    assert random_bytes(1234567, 13).tobytes() == expected[:13]
    assert random_bytes(2**64 + 1234567, 8).tobytes() == expected[:8]
    assert random_bytes(5, 3).dtype == np.uint8


def test_a_stream_depends_on_its_parts_alone() -> None:
    first, again, other = Rng("a", 1), Rng("a", 1), Rng("a", 2)
    numbers = [first.bits() for _ in range(5)]
    assert numbers == [again.bits() for _ in range(5)]
    assert numbers != [other.bits() for _ in range(5)]
    assert all(0 <= number < 2**64 for number in numbers)


def test_choices_are_even() -> None:
    rng = Rng("even")
    counts = Counter(rng.below(10) for _ in range(100_000))
    assert set(counts) == set(range(10))
    assert all(abs(count - 10_000) < BIN_SLACK for count in counts.values())
    assert {rng.between(3, 5) for _ in range(100)} == {3, 4, 5}
    assert {rng.choice("xy") for _ in range(50)} == {"x", "y"}


def test_weights_and_chances() -> None:
    rng = Rng("weights")
    counts = Counter(rng.weighted((("a", 3), ("b", 0), ("c", 1))) for _ in range(40_000))
    assert set(counts) == {"a", "c"}
    assert abs(counts["c"] - 10_000) < BIN_SLACK
    assert abs(sum(rng.chance(25) for _ in range(40_000)) - 10_000) < BIN_SLACK
    assert not any(rng.chance(0) for _ in range(100))
    assert all(rng.chance(100) for _ in range(100))


def test_shuffling_reaches_every_order_and_keeps_the_input() -> None:
    rng = Rng("shuffle")
    options = [1, 2, 3]
    orders = Counter(tuple(rng.shuffled(options)) for _ in range(60_000))
    assert options == [1, 2, 3]
    assert len(orders) == 6
    assert all(abs(count - 10_000) < BIN_SLACK for count in orders.values())


def test_nothing_to_draw_from() -> None:
    with pytest.raises(DataError, match=r"no number in range\(0\)"):
        Rng("x").choice([])
