from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sphinxkit.evaluation.captions import bleu, cider, tokenize

SENTENCES = ["a red cube on a table", "two dogs run over the green lawn", "a man with a blue hat"]
ROUNDING = 1e-12  # of float64 sums


def test_tokenize() -> None:
    assert tokenize("The dog's ball -- it's RED, no. 5!") == ["the", "dog's", "ball", "it's", "red", "no", "5"]


def test_bleu_of_a_perfect_answer_is_one() -> None:
    scores = bleu(SENTENCES, [[sentence] for sentence in SENTENCES])
    assert scores == {f"bleu_{n}": pytest.approx(1.0) for n in (1, 2, 3, 4)}


def test_bleu_by_hand() -> None:
    # 5 words of which 4 match (clipped: "the" twice), 2 bigrams of 4; reference of 6 words: brevity exp(1 - 6/5)
    scores = bleu(["the the cat sat down"], [["the cat sat on the mat"]])
    brevity = math.exp(1 - 6 / 5)
    assert scores["bleu_1"] == pytest.approx(brevity * 4 / 5, abs=ROUNDING)
    assert scores["bleu_2"] == pytest.approx(brevity * math.sqrt(4 / 5 * 2 / 4), abs=ROUNDING)
    assert scores["bleu_4"] == 0.0


def test_bleu_takes_the_closest_reference_length_and_clips_over_all_references() -> None:
    scores = bleu(["a b c"], [["a x y z w v", "b c d"]])
    assert scores["bleu_1"] == pytest.approx(1.0)


def test_bleu_of_nothing() -> None:
    assert bleu([""], [["a"]])["bleu_1"] == 0.0
    assert bleu([], [])["bleu_1"] == 0.0


def test_cider_by_hand() -> None:
    # Two samples; every unigram below is in one sample's references only: idf = log 2, and so for longer n-grams.
    references = [["red cube"], ["blue ball"]]
    # The first is perfect in n = 1, 2 and has no n = 3, 4. The second has one word right of one: cosine 1/sqrt(2) for
    # n = 1, length penalty exp(-1/72).
    value = cider(["red cube", "blue"], references)
    second = math.exp(-1 / 72) * (1 / math.sqrt(2)) / 4
    assert value == pytest.approx(10 * ((2 / 4) + second) / 2, abs=ROUNDING)


def test_cider_clips_repeated_words() -> None:
    references = [["red cube"], ["blue ball"]]
    once, twice = (cider([text, ""], references) for text in ("red", "red red"))
    assert twice < once * 2


def test_cider_of_nothing_is_zero() -> None:
    assert cider([], []) == 0.0
    assert cider(["a b"], [[]]) == 0.0


@given(st.lists(st.sampled_from(SENTENCES), min_size=2, max_size=5))
def test_cider_lies_in_its_range(predictions: list[str]) -> None:
    references = [[SENTENCES[index % 3]] for index in range(len(predictions))]
    assert 0.0 <= cider(predictions, references) <= 10.0 + ROUNDING
