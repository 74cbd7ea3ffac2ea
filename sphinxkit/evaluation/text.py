"""Scores of one text answer against its gold answer: pure functions of strings."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

OPTION_LETTERS = ("A", "B", "C", "D", "E")
RELAXED_TOLERANCE = 0.05  # ChartQA, arXiv:2203.10244, section 5.1
ANLS_THRESHOLD = 0.5  # ST-VQA, arXiv:1905.13648, section 4; DocVQA, arXiv:2007.00398, section 5
YES_NO_PREFIX = 4  # MME's evaluation looks at this many leading characters


def mean(values: Collection[float]) -> float:
    """The mean; 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def exact_match(prediction: str, gold: str) -> bool:
    """Equal after every '.' is removed, the ends are stripped and the case is lowered; no other clean-up."""
    return prediction.replace(".", "").strip().lower() == gold.replace(".", "").strip().lower()


def letter_match(prediction: str, gold: str) -> bool:
    """The text before the first '.' of the prediction equals the gold letter; anything else is wrong."""
    return exact_match(prediction.split(".", 1)[0], gold)


def choice_match(prediction: str, gold: str) -> bool:
    """``letter_match`` where the gold answer is one of A to E, else ``exact_match``."""
    return letter_match(prediction, gold) if gold in OPTION_LETTERS else exact_match(prediction, gold)


def read_number(text: str) -> float | None:
    """The finite number that the whole text is; a '%' at its end divides by 100; None if it is no number."""
    try:
        number = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def relaxed_match(prediction: str, gold: str) -> bool:
    """ChartQA's relaxed correctness: numbers within 5 % of a non-zero gold number, else equality in lower case.

    Args:
        prediction: The model's answer; the caller strips it.
        gold: The gold answer.
    Source: Masry et al., ChartQA, arXiv:2203.10244, section 5.1.
    """
    predicted, wanted = read_number(prediction), read_number(gold)
    if predicted is not None and wanted:
        return abs(predicted - wanted) / abs(wanted) <= RELAXED_TOLERANCE
    return prediction.lower() == gold.lower()


def levenshtein(left: str, right: str) -> int:
    """Fewest insertions, deletions and substitutions of characters that turn one string into the other."""
    if len(left) < len(right):
        left, right = right, left
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def anls(prediction: str, golds: Sequence[str]) -> float:
    """Normalised Levenshtein similarity to the closest gold answer, 0 below one half.

    Both sides are stripped and lower-cased, and white space is collapsed. The mean over questions is ANLS.

    Args:
        prediction: The model's answer.
        golds: Every accepted answer.
    Returns:
        Similarity in [0.5, 1], or 0.
    Source: Biten et al., arXiv:1905.13648, equation 1; the DocVQA challenge's evaluation.
    """
    predicted = " ".join(prediction.lower().split())
    best = 0.0
    for gold in golds:
        wanted = " ".join(gold.lower().split())
        length = max(len(predicted), len(wanted))
        # the difference in length alone is a lower bound of the distance: past one half nothing can be won
        if length and abs(len(predicted) - len(wanted)) / length > 1 - ANLS_THRESHOLD:
            continue
        best = max(best, 1.0 - (levenshtein(predicted, wanted) / length if length else 0.0))
    return best if best >= ANLS_THRESHOLD else 0.0


def read_yes_no(prediction: str) -> str:
    """MME's reading of an answer: "yes", "no" or "other".

    In lower case, the whole text, or "yes" and then "no" within its first four characters.
    Source: Fu et al., MME, arXiv:2306.13394, its evaluation tool.
    """
    text = prediction.lower()
    if text in ("yes", "no"):
        return text
    head = text[:YES_NO_PREFIX]
    return "yes" if "yes" in head else "no" if "no" in head else "other"


def read_pope(prediction: str) -> str:
    """POPE's reading of an answer: "no" if its first sentence has the word no or not, else "yes".

    Source: Li et al., POPE, arXiv:2305.10355, its evaluation script.
    """
    words = prediction.split(".", 1)[0].replace(",", "").split()
    return "no" if {"No", "no", "not"}.intersection(words) else "yes"
