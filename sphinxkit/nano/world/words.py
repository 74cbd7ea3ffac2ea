"""Pronounceable made-up words, and numerals, for images with text."""

from __future__ import annotations

from sphinxkit.nano.world.rng import Rng
from sphinxkit.nano.world.splits import is_held_out_word

CONSONANTS, VOWELS = "BCDFGHJKLMNPRSTVWXZ", "AEIOUY"
# c: consonant, v: vowel; with weights, our choice.
PATTERNS = (("cvc", 4), ("cvcv", 3), ("vcv", 1), ("cvvc", 1), ("cvcvc", 2))
NUMERAL_PERCENT = 15


def draw_word(rng: Rng, held_out: bool, longest: int = 5, numerals: bool = True) -> str:
    """A word that training sees, or one that it never does.

    Args:
        rng: Random choices.
        held_out: Whether training never sees it.
        longest: Letters at most; at least 3.
        numerals: Whether it may be a numeral of two or three digits.
    """
    patterns = [(pattern, weight) for pattern, weight in PATTERNS if len(pattern) <= longest]
    while True:
        if numerals and rng.chance(NUMERAL_PERCENT):
            word = str(rng.between(10, 999))
        else:
            pattern = rng.weighted(patterns)
            word = "".join(rng.choice(CONSONANTS if kind == "c" else VOWELS) for kind in pattern)
        if is_held_out_word(word) == held_out:
            return word
