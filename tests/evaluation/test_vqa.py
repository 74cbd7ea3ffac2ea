from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sphinxkit.evaluation.metrics import normalize_vqa_answer, vqa_accuracy


def test_every_golden_pair(golden: Path) -> None:
    pairs = json.loads((golden / "scoring" / "vqa_normalisation.json").read_text())
    assert len(pairs) > 2000
    assert [(text, normalize_vqa_answer(text)) for text, _ in pairs] == [(text, wanted) for text, wanted in pairs]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("  many\nlines\ttabs ", "many lines tabs"),
        ("1,000 dollars", "1000 dollars"),  # a comma between digits: every mark vanishes
        ("1,000-dollar", "1000dollar"),
        ("half-pipe", "half pipe"),
        ("boston - tokyo", "boston tokyo"),
        ("3.5 inch.", "3.5 inch"),
        ("2:50 pm", "2:50 pm"),
        ("The two cats, and an a", "2 cats and"),
        ("dont youre somebodyd've", "don't you're somebody'd've"),
        ("none", "0"),
        ("A", ""),
    ],
)
def test_rules(text: str, wanted: str) -> None:
    assert normalize_vqa_answer(text) == wanted


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=40))
def test_the_result_has_no_articles_and_single_spaces(text: str) -> None:
    words = normalize_vqa_answer(text).split(" ")
    assert not {"a", "an", "the"} & set(words)
    assert words == [""] or "" not in words


@pytest.mark.parametrize(
    ("matches", "wanted"),
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_accuracy_of_ten_answers_is_the_mean_over_leave_one_out(matches: int, wanted: float) -> None:
    answers = ["the Dog"] * matches + [f"cat {index}" for index in range(10 - matches)]
    assert vqa_accuracy("a dog.", answers) == pytest.approx(wanted, abs=1e-12)


def test_a_single_answer_is_compared_for_equality() -> None:
    assert vqa_accuracy("Two", ["2"]) == 1.0
    assert vqa_accuracy("Two", ["3"]) == 0.0
    assert vqa_accuracy("Two", []) == 0.0
