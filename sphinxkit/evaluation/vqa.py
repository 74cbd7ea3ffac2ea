"""VQA accuracy: the official answer normalisation, and the agreement with ten people.

Tables and rules are those of the published evaluation; the code is our own.
Source: Antol et al., VQA, arXiv:1505.00468, section 3; visualqa.org/evaluation; GT-Vision-Lab/VQA, vqaEval.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = frozenset(("a", "an", "the"))
NUMBER_WORDS = {
    **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"},
    **{"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}
# A period is dropped unless a digit follows it.
_PERIOD = re.compile(r"\.(?!\d)")
_DIGIT_COMMA = re.compile(r"\d,\d")

# Words whose one apostrophe is missing. The published table also has "Im", "Ive" and "Id've" in capitals, which no
# lower-cased word ever meets; they are left out.
_REGULAR = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'ll": "how it somebody someone something they what who why you",
    "'s": "he how somebody someone that there what when where who why",
    "'re": "there they what why you",
}
# Two suffixes, one or both of whose apostrophes are missing.
_DOUBLE = {
    ("n't", "'ve"): "could had might should would",
    ("'d", "'ve"): "he it she somebody someone something there they we who you",
}
# What is irregular in the published table; its entry "somebody'd" is kept as it stands there.
_IRREGULAR = {
    "maam": "ma'am",
    "oclock": "o'clock",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "somebody'd": "somebodyd",
    "twas": "'twas",
    "yall": "y'all",
    "yall'll": "y'all'll",
    "y'allll": "y'all'll",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
}


def _contractions() -> dict[str, str]:
    table = dict(_IRREGULAR)
    for suffix, stems in _REGULAR.items():
        for stem in stems.split():
            table[stem + suffix.replace("'", "")] = stem + suffix
    for (first, second), stems in _DOUBLE.items():
        for stem in stems.split():
            table[stem + first.replace("'", "") + second] = stem + first + second
            table[stem + first + second.replace("'", "")] = stem + first + second
    return table


CONTRACTIONS = _contractions()


def _normalize_punctuation(text: str) -> str:
    """Each mark becomes a space, or nothing where it stands beside a space or the text has a comma between digits."""
    all_vanish = _DIGIT_COMMA.search(text) is not None
    table = {
        ord(mark): None if all_vanish or f"{mark} " in text or f" {mark}" in text else " "
        for mark in PUNCTUATION
        if mark in text
    }
    return _PERIOD.sub("", text.translate(table))


def normalize_vqa_answer(text: str) -> str:
    """The official VQA normalisation of an answer.

    Newline and tab become spaces and the ends are stripped; punctuation goes; then, word by word in lower case, number
    words become digits, articles go and contractions get the apostrophes that they lack.

    Args:
        text: An answer, of a person or a model.
    Returns:
        The normalised answer, words separated by single spaces; may be empty.
    Source: VQA evaluation, processPunctuation and processDigitArticle.
    """
    text = _normalize_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = (NUMBER_WORDS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Agreement of an answer with people's: the mean over leave-one-out of min(1, matches / 3).

    Both sides are normalised. With a single answer, the score is exact match (our choice).

    Args:
        prediction: The model's answer.
        answers: People's answers, usually ten.
    Returns:
        Accuracy in [0, 1]; 0 without answers.
    Source: visualqa.org/evaluation: averaged over all 10 choose 9 sets of people.
    """
    wanted = normalize_vqa_answer(prediction)
    hits = [normalize_vqa_answer(answer) == wanted for answer in answers]
    if len(hits) < 2:
        return float(any(hits))
    matches = sum(hits)
    return sum(min(1.0, (matches - hit) / 3) for hit in hits) / len(hits)
