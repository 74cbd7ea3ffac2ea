from __future__ import annotations

import string

import numpy as np
import pytest

from sphinxkit.errors import DataError
from sphinxkit.nano.world.font import GLYPH_HEIGHT, GLYPH_WIDTH, GLYPHS, crop, glyph, text_mask

# Two characters that differ in fewer pixels would be hard to tell apart.
LEAST_DIFFERENCE = 2


def test_every_letter_and_digit_is_there() -> None:
    assert set(GLYPHS) == set(string.ascii_uppercase + string.digits)
    assert all(glyph(character).shape == (GLYPH_HEIGHT, GLYPH_WIDTH) for character in GLYPHS)


def test_characters_differ() -> None:
    for one in GLYPHS:
        for other in GLYPHS:
            if one < other:
                assert (glyph(one) ^ glyph(other)).sum() >= LEAST_DIFFERENCE, (one, other)


def test_a_word_by_hand() -> None:
    rows = ["".join(".#"[pixel] for pixel in row) for row in text_mask("LI").astype(int)]
    assert rows == [
        "#......###",
        "#.......#.",
        "#.......#.",
        "#.......#.",
        "#.......#.",
        "#.......#.",
        "#####..###",
    ]


def test_scale_repeats_pixels() -> None:
    small, large = text_mask("KA7", 1), text_mask("KA7", 3)
    assert np.array_equal(large, np.kron(small, np.ones((3, 3), dtype=bool)))


def test_crop_leaves_ink_at_every_edge() -> None:
    mask = np.zeros((5, 6), dtype=bool)
    mask[1, 2] = mask[3, 3] = True
    assert crop(mask).tolist() == [[True, False], [False, False], [False, True]]


def test_what_cannot_be_set() -> None:
    with pytest.raises(DataError, match="there is no 'é'"):
        text_mask("é")
    with pytest.raises(DataError, match="cannot set '' at scale 1"):
        text_mask("")
    with pytest.raises(DataError, match="cannot set 'A' at scale 0"):
        text_mask("A", 0)
