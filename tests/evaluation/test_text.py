from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sphinxkit.evaluation.text import (
    anls,
    choice_match,
    exact_match,
    letter_match,
    levenshtein,
    read_number,
    read_pope,
    read_yes_no,
    relaxed_match,
)


@pytest.mark.parametrize(
    ("prediction", "gold", "wanted"),
    [
        ("true.", "true", True),
        (" TRUE ", "true", True),
        ("U.S.A.", "usa", True),
        ("the true", "true", False),
        ("", "true", False),
        ("a, b", "a b", False),
    ],
)
def test_exact_match(prediction: str, gold: str, wanted: bool) -> None:
    assert exact_match(prediction, gold) is wanted


@pytest.mark.parametrize(
    ("prediction", "wanted"),
    [
        ("B", True),
        ("B.", True),
        ("B. Low", True),
        (" b", True),
        ("B) Low", False),
        ("Low", False),
        ("", False),
        ("A", False),
    ],
)
def test_letter_match(prediction: str, wanted: bool) -> None:
    assert letter_match(prediction, "B") is wanted


def test_the_letter_rule_holds_for_letters_a_to_e_only() -> None:
    assert choice_match("B. Low", "B")
    assert not choice_match("G. Low", "G")
    assert choice_match("G", "G")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("12", 12.0),
        ("12.5%", 0.125),
        ("1e3", 1000.0),
        ("12 %", 0.12),
        ("nan", None),
        ("inf", None),
        ("1,000", None),
        ("", None),
    ],
)
def test_read_number(text: str, wanted: float | None) -> None:
    assert read_number(text) == (None if wanted is None else pytest.approx(wanted))


@pytest.mark.parametrize(
    ("prediction", "gold", "wanted"),
    [
        ("104.9", "100", True),
        ("95", "100", True),
        ("105.1", "100", False),
        ("-95", "-100", True),
        ("5%", "0.05", True),
        ("0", "0", True),  # a gold number of zero leaves equality
        ("0.0", "0", False),
        ("Saudi", "saudi", True),
        ("Saudi.", "Saudi", False),  # no dot removal
        ("ten", "10", False),
    ],
)
def test_relaxed_match(prediction: str, gold: str, wanted: bool) -> None:
    assert relaxed_match(prediction, gold) is wanted


def _oracle(left: str, right: str) -> int:
    if not left or not right:
        return len(left) + len(right)
    return min(
        _oracle(left[1:], right) + 1,
        _oracle(left, right[1:]) + 1,
        _oracle(left[1:], right[1:]) + (left[0] != right[0]),
    )


@given(st.text("abc", max_size=5), st.text("abc", max_size=5))
def test_levenshtein_by_its_recursion(left: str, right: str) -> None:
    assert levenshtein(left, right) == _oracle(left, right)


@pytest.mark.parametrize(
    ("prediction", "golds", "wanted"),
    [
        ("ITC  Limited", ["itc limited"], 1.0),
        ("itc limite", ["itc limited", "x"], 1 - 1 / 11),
        ("ab", ["abcd"], 0.5),  # the threshold itself counts
        ("a", ["abcd"], 0.0),
        ("abxx", ["abcd"], 0.5),
        ("axxx", ["abcd"], 0.0),
        ("", [""], 1.0),
        ("x", [], 0.0),
    ],
)
def test_anls(prediction: str, golds: list[str], wanted: float) -> None:
    assert anls(prediction, golds) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "wanted"),
    [
        ("Yes", "yes"),
        ("no.", "no"),
        ("yes, no", "yes"),
        (" no", "no"),
        ("I say yes", "other"),
        ("", "other"),
        ("Noyes", "no"),
    ],
)
def test_read_yes_no(prediction: str, wanted: str) -> None:
    assert read_yes_no(prediction) == wanted


@pytest.mark.parametrize(
    ("prediction", "wanted"),
    [
        ("Yes, there is", "yes"),
        ("No", "no"),
        ("It is not there", "no"),
        ("Yes. No", "yes"),
        ("", "yes"),
        ("Note", "yes"),
    ],
)
def test_read_pope(prediction: str, wanted: str) -> None:
    assert read_pope(prediction) == wanted
