from __future__ import annotations

import pytest

from sphinxkit.formatters import tasks
from tests.formatters.tasks.faults import faults


@pytest.mark.parametrize(
    ("text", "letter", "kinds"),
    [
        ("B.", "B", ["wording"]),
        ("(C)", "C", ["wording"]),
        ("B. Low", "B", ["wording"]),
        ("The answer is D.", "D", ["wording"]),
        ("**B**", "B", ["wording"]),
        ("The answer is **B**.", "B", ["wording"]),
        ("The answer is __B__.", "B", ["wording"]),
        ("`C`. Low", "C", ["wording"]),
        ("I think the answer: E", "E", ["wording"]),
        ("I think it is B.", "B", ["wording"]),
        ("option (C)", "C", ["wording"]),
        ("C low", "C", ["wording"]),
        ("b", "B", ["wording"]),
        ("Blue", None, ["wording!"]),
        ("A dog", None, ["wording!"]),
        ("It is A dog", None, ["wording!"]),
        ("I do not know", None, ["wording!"]),
        ("1", None, ["wording!"]),
        ("", None, ["empty!"]),
    ],
)
def test_letters(text: str, letter: str | None, kinds: list[str]) -> None:
    result = tasks.create("multiple_choice").parse(text)
    assert result.items == ((letter,) if letter else ())
    assert faults(result) == kinds


def test_letters_behind_the_words_put_into_the_mouth() -> None:
    task = tasks.create("multiple_choice", answer_start=" The answer is")
    assert task.answer_start == "The answer is"
    sample = tasks.MultipleChoiceSample("q", ("x", "y"), 1)
    assert task.format(sample).answer == "The answer is B"
    assert task.parse("The answer is B").is_strict
    assert task.parse("B").is_strict
