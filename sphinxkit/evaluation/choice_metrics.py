"""The metrics of A-OKVQA and MMBench."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sphinxkit.errors import DataError
from sphinxkit.evaluation.annotation import Annotation, Record
from sphinxkit.evaluation.result import MetricResult
from sphinxkit.evaluation.text import exact_match, letter_match, mean
from sphinxkit.evaluation.text_metrics import find_letter, lenient_choice
from sphinxkit.evaluation.vqa import normalize_vqa_answer
from sphinxkit.formatters.tasks.multiple_choice import LETTERS

AGREEMENT = 3  # people who gave the answer make it fully right; VQA, arXiv:1505.00468, section 3
CIRCULAR_STEP = 1_000_000  # MMBench: rotation n of question i has the index i + n * 1,000,000

Hit = Callable[[Record], bool]


def _choices(annotation: Annotation) -> list[str]:
    found = annotation.fields.get("choices")
    if not isinstance(found, list) or annotation.gold not in LETTERS[: len(found)]:
        raise DataError(
            f"{annotation.where}: expected 'choices' and the letter of one of them, got {found!r:.60} and "
            f"{annotation.gold!r:.20}"
        )
    return found


def _named(record: Record) -> bool:
    """The answer is the right choice's text or letter."""
    choices, gold = _choices(record.annotation), record.annotation.gold
    return record.prediction == choices[LETTERS.index(gold)] or letter_match(record.prediction, gold)


def _found(record: Record) -> bool:
    """``_named``, the task's parser finds the letter, or the text is that of the right choice but for its form."""
    choices, gold = _choices(record.annotation), record.annotation.gold
    same = exact_match(record.prediction, choices[LETTERS.index(gold)])
    return _named(record) or same or lenient_choice(record.prediction, gold)


def _unread(record: Record) -> bool:
    choices = _choices(record.annotation)
    letter = record.prediction.split(".", 1)[0].strip().upper()
    return (record.prediction not in choices and letter not in LETTERS[: len(choices)]) or not letter


def _result(
    records: Sequence[Record], score: Callable[[Hit], dict[str, Any]], notes: tuple[str, ...] = ()
) -> MetricResult:
    unread = [record for record in records if _unread(record)]
    lost = sum(find_letter(record.prediction) is None for record in unread)
    return MetricResult(score(_named), len(unread), score(_found), notes, lost)


def aokvqa_choice(records: Sequence[Record]) -> MetricResult:
    """A-OKVQA's multiple choice: the answer equals the right choice; its letter counts as well (our choice).

    Source: Schwenk et al., A-OKVQA, arXiv:2206.01718; github.com/allenai/aokvqa, evaluation/eval_predictions.py.
    """
    return _result(records, lambda hit: {"accuracy": mean([hit(record) for record in records])})


def aokvqa_direct(records: Sequence[Record]) -> MetricResult:
    """A-OKVQA's direct answers: min(1, equal answers / 3); questions marked difficult are left out.

    The lenient value normalises both sides as VQA does.
    Source: github.com/allenai/aokvqa, evaluation/eval_predictions.py.
    """
    asked = [record for record in records if not record.annotation.fields.get("difficult_direct_answer")]

    def score(record: Record, form: Callable[[str], str]) -> float:
        golds = record.annotation.fields.get("direct_answers")
        if not isinstance(golds, list):
            raise DataError(f"{record.annotation.where}: 'direct_answers' must be a list, got {golds!r:.60}")
        return min(1.0, sum(form(str(gold)) == form(record.prediction) for gold in golds) / AGREEMENT)

    strict, lenient = (mean([score(record, form) for record in asked]) for form in (str, normalize_vqa_answer))
    left_out = len(records) - len(asked)
    notes = (f"{left_out} questions are marked difficult and left out",) if left_out else ()
    unparsable = sum(not record.prediction.strip() for record in asked)
    return MetricResult({"accuracy": strict}, unparsable, {"accuracy": lenient}, notes)


def mmbench(records: Sequence[Record]) -> MetricResult:
    """MMBench: ``accuracy`` by CircularEval, ``vanilla`` of the questions as they stand, and both kinds of category.

    A question counts in ``accuracy`` if the answers to it and to all rotations of its choices in the file are right.
    MMBench lets GPT-4 read answers that do not name a letter; here they are wrong, and the lenient values use the
    task's parser.
    Source: Liu et al., MMBench, arXiv:2307.06281, sections 4.1 and 4.2; VLMEvalKit, vlmeval/dataset/image_mcq.py.
    """
    groups: dict[int, list[Record]] = {}
    for record in records:
        number = record.annotation.question_id
        if not isinstance(number, int):
            raise DataError(f"{record.annotation.where}: MMBench's index must be a number, got {number!r:.20}")
        groups.setdefault(number % CIRCULAR_STEP, []).append(record)

    def score(hit: Hit) -> dict[str, Any]:
        right = {number: all(map(hit, group)) for number, group in groups.items()}
        first = [record for record in records if int(record.annotation.question_id) < CIRCULAR_STEP]
        scores: dict[str, Any] = {"accuracy": mean(right.values()), "vanilla": mean([hit(each) for each in first])}
        for field in ("l2-category", "category"):
            members: dict[str, list[bool]] = {}
            for number, group in groups.items():
                if name := str(group[0].annotation.fields.get(field) or ""):
                    members.setdefault(name, []).append(right[number])
            if members:
                scores[field] = {name: mean(members[name]) for name in sorted(members)}
        return scores

    note = () if len(groups) < len(records) else ("the file has no rotations: accuracy is vanilla accuracy",)
    return _result(records, score, note)
