from __future__ import annotations

import pytest

from sphinxkit.errors import DataError
from sphinxkit.generation import answer_length, check_context, truncate_left


def test_text_images_and_new_tokens_fit_together() -> None:
    check_context("prompt 0", 90, 100, num_new_tokens=10)
    told = "prompt 0 takes 91 positions, 40 of them image tokens and the answer needs at least 10, but .* holds 100"
    with pytest.raises(DataError, match=told):
        check_context("prompt 0", 91, 100, num_new_tokens=10, num_image_tokens=40)
    check_context("row", 100, 100)
    with pytest.raises(DataError, match="row takes 101 positions, but the context holds 100"):
        check_context("row", 101, 100)


def test_an_answer_ends_where_the_context_ends() -> None:
    assert [answer_length("it", used, 8, 100) for used in (50, 92, 93, 99)] == [8, 8, 7, 1]
    with pytest.raises(DataError, match="it takes 100 positions and the answer needs at least 1"):
        answer_length("it", 100, 8, 100)


def test_truncating_keeps_the_first_token_and_the_end() -> None:
    ids = list(range(60))
    assert truncate_left("it", ids, 40, 100) == ids
    assert truncate_left("it", ids, 41, 100) == [0, *range(2, 60)]
    assert truncate_left("it", ids, 40, 100, num_image_tokens=30) == [0, *range(31, 60)]
    assert truncate_left("it", ids, 84, 100) == [0, *range(45, 60)]
    with pytest.raises(DataError, match="it has 60 tokens, and max_new_tokens 85 with 0 image tokens leaves 15 of the"):
        truncate_left("it", ids, 85, 100)
    with pytest.raises(DataError, match="max_new_tokens 500 with 7 image tokens leaves 0 of the context of 100"):
        truncate_left("it", ids, 500, 100, num_image_tokens=7)
    assert truncate_left("it", ids[:16], 500, 100) == ids[:16]
