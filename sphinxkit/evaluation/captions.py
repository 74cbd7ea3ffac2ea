"""Corpus scores of generated sentences: BLEU-1 to 4 and CIDEr-D.

Words are runs of letters, digits and apostrophes in lower case; the caption toolkits' Java tokeniser (PTB) splits off
more ("'s", for one), so values may differ from theirs in the third decimal (our choice).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

MAX_N = 4
CIDER_SIGMA = 6.0  # CIDEr-D's length penalty
CIDER_SCALE = 10.0
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")

NGram = tuple[str, ...]


def tokenize(text: str) -> list[str]:
    """Words of a sentence, lower case, without punctuation."""
    return _WORD.findall(text.lower())


def _ngrams(words: Sequence[str], n: int) -> Counter[NGram]:
    return Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Corpus BLEU with clipped counts and the closest reference length, not smoothed.

    Args:
        predictions: One sentence per sample.
        references: Every sample's references, in the same order.
    Returns:
        ``bleu_1`` to ``bleu_4``, each in [0, 1].
    Source: Papineni et al., BLEU, ACL 2002, section 2.
    """
    matched, total = [0] * MAX_N, [0] * MAX_N
    length = closest = 0
    for prediction, golds in zip(predictions, references, strict=True):
        words, gold_words = tokenize(prediction), [tokenize(gold) for gold in golds]
        length += len(words)
        closest += min((abs(len(gold) - len(words)), len(gold)) for gold in gold_words)[1] if gold_words else 0
        for n in range(1, MAX_N + 1):
            counts = _ngrams(words, n)
            limits: Counter[NGram] = Counter()
            for gold in gold_words:
                limits |= _ngrams(gold, n)
            matched[n - 1] += sum((counts & limits).values())
            total[n - 1] += sum(counts.values())
    brevity = 1.0 if length >= closest else math.exp(1 - closest / length) if length else 0.0
    scores, log_sum = {}, 0.0
    for n in range(1, MAX_N + 1):
        precision = matched[n - 1] / total[n - 1] if total[n - 1] else 0.0
        log_sum += math.log(precision) if precision > 0 else -math.inf
        scores[f"bleu_{n}"] = brevity * math.exp(log_sum / n)
    return scores


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D: tf-idf cosine of n-grams, n = 1 to 4, clipped, with a Gaussian penalty on the difference in length.

    The document frequencies come from the references given, so the value of one sample depends on the others.

    Args:
        predictions: One sentence per sample.
        references: Every sample's references, in the same order.
    Returns:
        The mean over samples, in [0, 10]; 0 without samples.
    Source: Vedantam et al., CIDEr, arXiv:1411.5726, sections 4 and 6 (CIDEr-D).
    """
    gold_words = [[tokenize(gold) for gold in golds] for golds in references]
    frequency: Counter[NGram] = Counter()
    for golds in gold_words:
        frequency.update({gram for gold in golds for n in range(1, MAX_N + 1) for gram in _ngrams(gold, n)})
    log_samples = math.log(max(len(predictions), 1))

    def weights(words: Sequence[str], n: int) -> tuple[dict[NGram, float], float]:
        vector = {
            gram: count * (log_samples - math.log(max(1, frequency[gram]))) for gram, count in _ngrams(words, n).items()
        }
        return vector, math.sqrt(sum(weight * weight for weight in vector.values()))

    total = 0.0
    for prediction, golds in zip(predictions, gold_words, strict=True):
        words = tokenize(prediction)
        own = [weights(words, n) for n in range(1, MAX_N + 1)]
        score = 0.0
        for gold in golds:
            penalty = math.exp(-((len(words) - len(gold)) ** 2) / (2 * CIDER_SIGMA**2))
            for n in range(1, MAX_N + 1):
                (vector, norm), (other, other_norm) = own[n - 1], weights(gold, n)
                if norm > 0 and other_norm > 0:
                    overlap = sum(
                        min(weight, other.get(gram, 0.0)) * other.get(gram, 0.0) for gram, weight in vector.items()
                    )
                    score += penalty * overlap / (norm * other_norm)
        total += CIDER_SCALE * score / (MAX_N * len(golds)) if golds else 0.0
    return total / len(predictions) if predictions else 0.0
