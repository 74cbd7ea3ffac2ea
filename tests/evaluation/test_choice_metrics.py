from __future__ import annotations

from typing import Any

import pytest

from sphinxkit.errors import DataError
from sphinxkit.evaluation.annotation import Annotation, Record
from sphinxkit.evaluation.choice_metrics import aokvqa_choice, aokvqa_direct, mmbench


def record(prediction: str, gold: Any = "B", number: Any = 1, **fields: Any) -> Record:
    fields.setdefault("choices", ["cat", "dog"])
    return Record(Annotation(number, "a.png", "?", gold, "f:1", None, fields), prediction)


def test_aokvqa_choice_takes_the_text_or_the_letter() -> None:
    result = aokvqa_choice([record(text) for text in ("dog", "B", "B. dog", "A", "Dog", "no idea")])
    assert result.scores == {"accuracy": 3 / 6}
    assert result.lenient == {"accuracy": 4 / 6}  # "Dog" differs in its form alone
    assert result.unparsable == 2  # "Dog", "no idea"


def test_aokvqa_direct_counts_three_people() -> None:
    answers = ["red"] * 2 + ["dark red"] * 3 + ["a rose"]
    records = [record(text, direct_answers=answers) for text in ("red", "dark red", "Red", "blue")]
    left_out = record("red", direct_answers=answers, difficult_direct_answer=True)
    result = aokvqa_direct([*records, left_out])
    assert result.scores == {"accuracy": pytest.approx((2 / 3 + 1) / 4)}
    assert result.lenient == {"accuracy": pytest.approx((2 / 3 + 1 + 2 / 3) / 4)}
    assert result.notes == ("1 questions are marked difficult and left out",)


def test_mmbench_wants_every_rotation_right() -> None:
    records = [
        *(record("B", number=1, category="a"), record("A", "A", number=1_000_001, category="a")),
        *(record("B", number=2, category="b"), record("B", "A", number=1_000_002, category="b")),
        record("A", number=3, category="b"),
    ]
    result = mmbench(records)
    assert result.scores == {"accuracy": 1 / 3, "vanilla": 2 / 3, "category": {"a": 1.0, "b": 0.0}}
    assert mmbench(records[:1]).notes == ("the file has no rotations: accuracy is vanilla accuracy",)


def test_bad_annotations() -> None:
    with pytest.raises(DataError, match="f:1: expected 'choices' and the letter of one of them, got .* and 'C'"):
        aokvqa_choice([record("B", "C")])
    with pytest.raises(DataError, match="'direct_answers' must be a list, got None"):
        aokvqa_direct([record("B")])
    with pytest.raises(DataError, match="MMBench's index must be a number, got 'q1'"):
        mmbench([record("B", number="q1")])
