"""A pseudo-random permutation of 0 .. n-1 that is computed point by point.

Nothing is stored, any point costs the same, and the result depends on Python integers only: the order of the data is
the same on every machine and with every version of every library, and a run can be resumed anywhere.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from sphinxkit.errors import DataError

ROUNDS = 6  # of the Feistel network; four suffice for indistinguishability (Luby and Rackoff, 1988), two for margin
MIN_HALF_BITS = 3  # so that small n draw from a domain with more than a few permutations; our choice
SPLITMIX64_GAMMA = 0x9E3779B97F4A7C15
"""What splitmix64 adds to its state for each number."""

_MASK = (1 << 64) - 1


def derive_key(*parts: object) -> int:
    """A 64-bit key from any values, by their ``repr``."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def splitmix64(value: int) -> int:
    """splitmix64's output function: 64 well-mixed bits of a 64-bit state.

    Args:
        value: The state, in [0, 2**64).
    Source: Steele, Lea and Flood, OOPSLA 2014, doi:10.1145/2660193.2660195.
    """
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


@dataclass(frozen=True, slots=True)
class Permutation:
    """A permutation of ``range(size)``: a balanced Feistel network over the next power of four, walked back into range.

    Args:
        size: Number of elements.
        key: Selects the permutation.
    Source: Luby and Rackoff, SIAM J. Comput. 1988; cycle walking: Black and Rogaway, CT-RSA 2002.
    """

    size: int
    key: int
    _keys: tuple[int, ...] = field(init=False, repr=False)
    _half_bits: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "_keys", tuple(splitmix64((self.key + n * SPLITMIX64_GAMMA) & _MASK) for n in range(ROUNDS))
        )
        bits = max(self.size - 1, 1).bit_length()
        object.__setattr__(self, "_half_bits", max(MIN_HALF_BITS, math.ceil(bits / 2)))

    def __call__(self, index: int) -> int:
        """Permute one index.

        Raises:
            DataError: ``index`` is out of range.
        """
        if not 0 <= index < self.size:
            raise DataError(f"permutation: index {index} is outside range({self.size})")
        bits = self._half_bits
        mask = (1 << bits) - 1
        while True:
            left, right = index >> bits, index & mask
            for key in self._keys:
                left, right = right, left ^ (splitmix64(right ^ key) & mask)
            index = left << bits | right
            if index < self.size:
                return index


def block_permutation(size: int, block: int, key: int, index: int) -> int:
    """Permute one index so that neighbours stay in blocks: whole blocks are shuffled, and the indices of each.

    The last block, if it is smaller, stays the last.

    Args:
        size: Number of elements.
        block: Elements of a block.
        key: Selects the permutation.
        index: In range(size).
    """
    number, within = divmod(index, block)
    whole = size // block
    if number < whole:
        number = Permutation(whole, key)(number)
    inside = min(block, size - number * block)
    return number * block + Permutation(inside, derive_key(key, number))(within)


def interleave(counts: Sequence[int], index: int) -> tuple[int, int]:
    """Merge sequences evenly: element ``index`` of the merged one as (sequence, place in it).

    Args:
        counts: Lengths of the sequences.
        index: In range(sum(counts)).
    """
    first, last = 0, len(counts)
    while last - first > 1:
        middle = (first + last) // 2
        total, right = sum(counts[first:last]), sum(counts[middle:last])
        before = index * right // total
        if (index + 1) * right // total > before:
            first, index = middle, before
        else:
            last, index = middle, index - before
    return first, index
