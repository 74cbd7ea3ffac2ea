from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sphinxkit.errors import DataError
from sphinxkit.formatters import sphinx_v1
from sphinxkit.formatters.coordinate_grid import move_to_grid


def test_lists_of_points_and_boxes_are_moved_and_nothing_else() -> None:
    text = "[0.1013,0.3,0.599,1.0] and [ .25, 0.75; 0.0625,1.000] but 0.333, [1,2], [0.5] and [0.1,0.2"
    moved = "[0.102,0.297,0.602,1.000] and [ 0.250, 0.750; 0.062,1.000] but 0.333, [1,2], [0.5] and [0.1,0.2"
    assert move_to_grid(text, 128) == moved
    assert move_to_grid("[1.9,0.2]", 4) == "[1.000,0.250]"


@given(st.lists(st.integers(0, 128), min_size=2, max_size=4), st.just(128))
def test_what_is_on_the_grid_stays(places: list[int], steps: int) -> None:
    text = "[" + ",".join(f"{place / steps:.3f}" for place in places) + "]"
    assert move_to_grid(text, steps) == text


def test_a_template_moves_questions_and_not_answers() -> None:
    box = "[0.101,0.300,0.599,0.802]"
    messages = [{"role": "user", "content": f"What is in {box}?"}, {"role": "assistant", "content": box}]
    assert sphinx_v1().prompt(messages).count(box) == 2
    text = sphinx_v1(coordinate_grid=10).prompt(messages)
    assert "What is in [0.100,0.300,0.600,0.800]?" in text
    assert text.count(box) == 1
    rendered = sphinx_v1(coordinate_grid=10).render(messages)
    [(start, end)] = rendered.answer_spans
    assert rendered.text[start:end] == f" {box}\n###"


def test_a_grid_has_a_step() -> None:
    with pytest.raises(DataError, match="coordinate_grid must be at least 1, or None; got 0"):
        sphinx_v1(coordinate_grid=0)
