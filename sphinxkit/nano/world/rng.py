"""Random numbers that are the same on every machine: integers out of a key and a counter.

The n-th number is a function of the key and n alone (splitmix64), so anything can be drawn without drawing what comes
before it, and nothing depends on a library's generator.
Source: Steele, Lea and Flood, OOPSLA 2014, splitmix64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sphinxkit.data.permutation import SPLITMIX64_GAMMA, derive_key, splitmix64
from sphinxkit.errors import DataError

T = TypeVar("T")

_MASK = (1 << 64) - 1


def random_bytes(key: int, count: int) -> NDArray[np.uint8]:
    """The first ``count`` bytes of a key's numbers, each number's lowest byte first.

    Args:
        key: 64 bits.
        count: How many.
    Shape:
        return: (count,) uint8
    """
    state = np.arange(1, (count + 7) // 8 + 1, dtype=np.uint64)
    state *= np.uint64(SPLITMIX64_GAMMA)
    state += np.uint64(key & _MASK)
    state ^= state >> np.uint64(30)
    state *= np.uint64(0xBF58476D1CE4E5B9)
    state ^= state >> np.uint64(27)
    state *= np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return state.astype("<u8").view(np.uint8)[:count]


class Rng:
    """A stream of random choices.

    Args:
        parts: What the stream is for; any values with a ``repr`` that says which.
    """

    __slots__ = ("_state", "key")

    def __init__(self, *parts: object) -> None:
        self.key = derive_key(*parts)
        self._state = self.key

    def bits(self) -> int:
        """64 random bits."""
        self._state = (self._state + SPLITMIX64_GAMMA) & _MASK
        return splitmix64(self._state)

    def below(self, count: int) -> int:
        """A number in range(count).

        Raises:
            DataError: ``count`` is not positive.
        """
        if count <= 0:
            raise DataError(f"rng: there is no number in range({count})")
        return (self.bits() * count) >> 64

    def between(self, low: int, high: int) -> int:
        """A number from ``low`` to ``high``, both included."""
        return low + self.below(high - low + 1)

    def chance(self, percent: int) -> bool:
        """True in ``percent`` of 100 cases."""
        return self.below(100) < percent

    def choice(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[self.below(len(options))]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        """The options in another order (Fisher and Yates)."""
        result = list(options)
        for last in range(len(result) - 1, 0, -1):
            other = self.below(last + 1)
            result[last], result[other] = result[other], result[last]
        return result

    def weighted(self, options: Sequence[tuple[T, int]]) -> T:
        """One of the options in proportion to their whole-number weights."""
        ticket = self.below(sum(weight for _, weight in options))
        for option, weight in options:
            ticket -= weight
            if ticket < 0:
                return option
        return options[-1][0]
