"""A bitmap font of 5 x 7 pixels, drawn for this project, and words set in it."""

from __future__ import annotations

from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

from sphinxkit.errors import DataError

GLYPH_WIDTH, GLYPH_HEIGHT = 5, 7
ADVANCE = GLYPH_WIDTH + 1

# Each glyph row by row from the top; 1 is ink.
GLYPHS = {
    "A": "01110 10001 10001 11111 10001 10001 10001",
    "B": "11110 10001 10001 11110 10001 10001 11110",
    "C": "01111 10000 10000 10000 10000 10000 01111",
    "D": "11110 10001 10001 10001 10001 10001 11110",
    "E": "11111 10000 10000 11110 10000 10000 11111",
    "F": "11111 10000 10000 11110 10000 10000 10000",
    "G": "01111 10000 10000 10111 10001 10001 01110",
    "H": "10001 10001 10001 11111 10001 10001 10001",
    "I": "01110 00100 00100 00100 00100 00100 01110",
    "J": "00111 00010 00010 00010 00010 10010 01100",
    "K": "10001 10010 10100 11000 10100 10010 10001",
    "L": "10000 10000 10000 10000 10000 10000 11111",
    "M": "10001 11011 10101 10101 10001 10001 10001",
    "N": "10001 11001 11001 10101 10011 10011 10001",
    "O": "01110 10001 10001 10001 10001 10001 01110",
    "P": "11110 10001 10001 11110 10000 10000 10000",
    "Q": "01110 10001 10001 10001 10101 10010 01101",
    "R": "11110 10001 10001 11110 10100 10010 10001",
    "S": "01111 10000 10000 01110 00001 00001 11110",
    "T": "11111 00100 00100 00100 00100 00100 00100",
    "U": "10001 10001 10001 10001 10001 10001 01110",
    "V": "10001 10001 10001 10001 01010 01010 00100",
    "W": "10001 10001 10001 10101 10101 11011 10001",
    "X": "10001 10001 01010 00100 01010 10001 10001",
    "Y": "10001 10001 01010 00100 00100 00100 00100",
    "Z": "11111 00001 00010 00100 01000 10000 11111",
    "0": "01110 10011 10011 10101 11001 11001 01110",
    "1": "00100 01100 00100 00100 00100 00100 01110",
    "2": "01110 10001 00001 00110 01000 10000 11111",
    "3": "11110 00001 00001 01110 00001 00001 11110",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "5": "11111 10000 11110 00001 00001 10001 01110",
    "6": "00110 01000 10000 11110 10001 10001 01110",
    "7": "11111 00001 00010 00010 00100 00100 00100",
    "8": "01110 10001 10001 01110 10001 10001 01110",
    "9": "01110 10001 10001 01111 00001 00010 01100",
}

Mask = NDArray[np.bool_]


@cache
def glyph(character: str) -> Mask:
    """A character's ink.

    Raises:
        DataError: The font lacks it.
    Shape:
        return: (7, 5) bool
    """
    if character not in GLYPHS:
        raise DataError(f"font: there is no {character!r}; the font has {''.join(GLYPHS)}")
    return np.array([[bit == "1" for bit in row] for row in GLYPHS[character].split()], dtype=np.bool_)


@lru_cache(maxsize=4096)
def text_mask(text: str, scale: int = 1) -> Mask:
    """A word's ink, cropped to it.

    Args:
        text: Characters of the font, without spaces.
        scale: Pixels per pixel of the font.
    Raises:
        DataError: The text is empty, the font lacks a character, or the scale is not positive.
    Shape:
        return: (height, width) bool; every outer row and column has ink
    """
    if not text or scale < 1:
        raise DataError(f"font: cannot set {text!r} at scale {scale}")
    line = np.zeros((GLYPH_HEIGHT, ADVANCE * len(text)), dtype=np.bool_)
    for index, character in enumerate(text):
        line[:, index * ADVANCE : index * ADVANCE + GLYPH_WIDTH] = glyph(character)
    mask = crop(line).repeat(scale, axis=0).repeat(scale, axis=1)
    mask.setflags(write=False)
    return mask


def crop(mask: Mask) -> Mask:
    """The mask without its empty outer rows and columns."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
