from __future__ import annotations

from typing import Any

import pytest

from sphinxkit.errors import DataError
from sphinxkit.evaluation import metrics
from sphinxkit.evaluation.annotation import Annotation, Record


def _records(
    pairs: list[tuple[str, Any]], paths: list[str] | None = None, ids: list[Any] | None = None
) -> list[Record]:
    return [
        Record(
            Annotation(
                ids[index] if ids else index, paths[index] if paths else "", "", gold, f"a.json:{index + 1}", None, {}
            ),
            prediction,
        )
        for index, (prediction, gold) in enumerate(pairs)
    ]


def test_accuracy_uses_the_letter_rule_by_gold_answer() -> None:
    result = metrics.score(
        "accuracy", _records([("B. Low", "B"), ("Yes.", "yes"), ("The answer is C", "C"), ("", "no")])
    )
    assert result.scores == {"accuracy": 0.5}
    assert result.lenient == {"accuracy": 0.75}
    assert result.unparsable == 2


def test_the_lenient_reading_takes_whatever_the_strict_one_takes() -> None:
    for metric, answer, gold in (
        ("accuracy", "b", "B"),
        ("accuracy", "3.5", "35"),  # every '.' is removed
        ("relaxed_accuracy", "$ ", "$"),
    ):
        result = metrics.score(metric, _records([(answer, gold)]))
        assert result.scores[metric] == result.lenient[metric] == 1.0
    result = metrics.score("mme", _records([("know", "no")] * 2, ["mme/OCR/1.jpg"] * 2))
    assert result.scores["categories"] == result.lenient["categories"] == {"OCR": 200.0}


@pytest.mark.parametrize(
    ("metric", "gold", "path"),
    [
        *(("accuracy", gold, "") for gold in ("B", "two words", "3.5")),
        *(("relaxed_accuracy", gold, "") for gold in ("3.5%", "two words")),
        *(("vqa_accuracy", ["two words"] * 10, ""), ("anls", ["two words"], ""), ("caption", ["two words"], "")),
        *(("pope", "yes", ""), ("mme", "no", "mme/OCR/1.jpg")),
    ],
)
def test_white_space_around_an_answer_changes_no_score(metric: str, gold: Any, path: str) -> None:
    answers = ["B. two", "two words", "3.5%", "Yes.", "no, it is not", ""]
    bare, spaced = (
        metrics.score(metric, _records([(end + answer + end, gold) for answer in answers], [path] * len(answers)))
        for end in ("", " ")
    )
    assert bare == spaced


@pytest.mark.parametrize(
    ("answer", "gold", "strict", "lenient"),
    [
        ("**B**", "B", 0.0, 1.0),
        ("E. fish", "E", 1.0, 1.0),
        ("F. fish", "F", 0.0, 1.0),  # the reference's rule ends with E
        ("The answer is F", "F", 0.0, 1.0),
        ("The answer is Z.", "Z", 0.0, 1.0),
        ("G. goat", "F", 0.0, 0.0),
        ("The answer is B", "C", 0.0, 0.0),
    ],
)
def test_letters_of_choices(answer: str, gold: str, strict: float, lenient: float) -> None:
    result = metrics.score("accuracy", _records([(answer, gold)]))
    assert (result.scores["accuracy"], result.lenient["accuracy"]) == (strict, lenient)


def test_accuracy_takes_the_best_of_several_gold_answers() -> None:
    assert metrics.score("accuracy", _records([("two", ["2", "two"]), ("3", 3)])).scores == {"accuracy": 1.0}


def test_vqa_accuracy_and_its_note_about_single_answers() -> None:
    ten = [{"answer": "dog"}] * 2 + [{"answer": f"x{i}"} for i in range(8)]
    result = metrics.score("vqa_accuracy", _records([("a dog", ten), ("cat", "cat")]))
    assert result.scores == {"vqa_accuracy": pytest.approx(0.8), "accuracy": pytest.approx(0.8)}
    assert "1 questions have a single gold answer" in result.notes[0]


def test_anls_and_relaxed_accuracy() -> None:
    assert metrics.score("anls", _records([("ab", ["abcd"]), ("x", "y")])).scores == {"anls": 0.25}
    result = metrics.score(
        "relaxed_accuracy", _records([("95.1", "100"), ("105", "100.0"), ("95", "100"), ("$1,000", "1000")])
    )
    assert result.scores["relaxed_accuracy"] == 0.75
    # with the arguments swapped 100 against 95.1 and 95 is more than 5 % off, 100 against 105 is not
    assert result.scores["reference_swapped_arguments"] == 0.25
    assert result.lenient == {"relaxed_accuracy": 1.0}


def test_mme_by_hand() -> None:
    # color: (right, right), (right, wrong): accuracy 3/4, accuracy+ 1/2; OCR: one pair wrong, "other" counts as wrong
    answers = [("Yes", "Yes"), ("no.", "No"), ("yes", "Yes"), ("yes", "No"), ("maybe", "yes"), ("it is no", "no")]
    paths = [
        "mme/color/1.jpg",
        "mme/color/1.jpg",
        "mme/color/2.jpg",
        "mme/color/2.jpg",
        "mme/OCR/1.jpg",
        "mme/OCR/1.jpg",
    ]
    records = _records(answers, paths, [0, 1, 2, 3, 0, 1])
    result = metrics.score("mme", list(reversed(records)))  # the order of the file plays no part
    assert result.scores == {"perception": 125.0, "cognition": 0.0, "categories": {"OCR": 0.0, "color": 125.0}}
    assert result.unparsable == 2
    assert result.lenient["categories"] == {"OCR": 50.0, "color": 125.0}
    assert "category scene is absent" in result.notes


@pytest.mark.parametrize(
    "ids",
    [
        [str(n) for n in range(24)],  # sorted as text: "0", "1", "10", "11", ...
        [n // 2 + 12 * (n % 2) for n in range(24)],  # the first questions of all images, then the second ones
        [-1] * 24,
    ],
)
def test_mme_pairs_questions_by_image(ids: list[Any]) -> None:
    """A model that says yes to everything has half of the questions right and no image."""
    answers = [("yes", "yes" if n % 2 == 0 else "no") for n in range(24)]
    paths = [f"MME/existence/{n // 2:04}.jpg" for n in range(24)]
    result = metrics.score("mme", _records(answers, paths, ids))
    assert result.scores["categories"] == {"existence": 50.0}
    assert not [note for note in result.notes if "exactly two" in note]


def test_mme_images_without_exactly_two_questions_are_reported() -> None:
    paths = [*["count/three.jpg"] * 3, "count/one.jpg", *["count/two.jpg"] * 2]
    answers = [("yes", "yes")] * 4 + [("yes", "yes"), ("yes", "no")]
    result = metrics.score("mme", _records(answers, paths))
    assert result.scores["categories"]["count"] == pytest.approx(100 * 5 / 6)  # accuracy+ of the one pair is 0
    assert [note for note in result.notes if "exactly two" in note] == [
        "category count has 2 images that do not have exactly two questions; accuracy+ leaves them out; the first is "
        "count/three.jpg with 3"
    ]


def test_mme_category_by_folder_before_any_place_in_the_path() -> None:
    records = _records([("yes", "yes"), ("yes", "yes")], ["x/color/scene_1.jpg", "x/my_position_set/1.jpg"])
    assert set(metrics.score("mme", records).scores["categories"]) == {"color", "position"}


def test_pope_by_hand() -> None:
    records = _records([("Yes", "yes"), ("yes it is", "no"), ("No", "yes"), ("There is not", "no")])
    scores = metrics.score("pope", records).scores
    assert scores == {"accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_ratio": 0.5}


def test_caption_and_classification() -> None:
    scores = metrics.score("caption", _records([("A dog.", ["a dog", "a cat"]), ("x", "y")])).scores
    assert scores["exact"] == 0.5
    assert set(scores) == {"cider", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "exact"}
    result = metrics.score(
        "classification_accuracy", _records([("This is a dog.", "dog"), ("It is a cat", "cat"), ("", "cat")])
    )
    assert result.scores == {"accuracy": pytest.approx(1 / 3)}
    assert result.lenient == {"accuracy": pytest.approx(2 / 3)}
    assert result.unparsable == 1


@pytest.mark.parametrize(
    ("metric", "gold", "path", "message"),
    [
        ("accuracy", {"a": 1}, "", r"a\.json:1: gt_answers must be text or a list of texts, got \{'a': 1\}"),
        ("accuracy", [], "", r"a\.json:1: gt_answers must be text or a list of texts"),
        ("mme", "maybe", "color/1.jpg", r"a\.json:1: gt_answers must be yes or no, got 'maybe'"),
        ("mme", "yes", "1.jpg", r"a\.json:1: no MME category in image_path '1\.jpg'"),
        ("pope", "maybe", "", r"a\.json:1: gt_answers must be yes or no"),
    ],
)
def test_bad_gold_answers(metric: str, gold: Any, path: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        metrics.score(metric, _records([("yes", gold)], [path]))


@pytest.mark.parametrize("metric", ["accuracy", "vqa_accuracy", "anls", "relaxed_accuracy", "pope", "caption"])
def test_no_records_score_zero(metric: str) -> None:
    scores = metrics.score(metric, []).scores
    assert all(value == 0.0 for value in scores.values())
