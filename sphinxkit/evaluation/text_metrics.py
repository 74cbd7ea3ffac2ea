"""The metrics of answers in words: functions of scored records."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from sphinxkit.errors import DataError
from sphinxkit.evaluation.annotation import Annotation, Record
from sphinxkit.evaluation.captions import bleu, cider
from sphinxkit.evaluation.result import MetricResult
from sphinxkit.evaluation.text import (
    OPTION_LETTERS,
    anls,
    choice_match,
    exact_match,
    mean,
    read_pope,
    read_yes_no,
    relaxed_match,
)
from sphinxkit.evaluation.vqa import normalize_vqa_answer, vqa_accuracy
from sphinxkit.formatters import tasks
from sphinxkit.formatters.tasks.multiple_choice import LETTERS
from sphinxkit.geometry import ImageGeometry

# Source: Fu et al., MME, arXiv:2306.13394, table 1; the names are those of its folders.
MME_PERCEPTION = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork"),
    "OCR",
)
EARLY_GRADES = frozenset(f"grade{number}" for number in range(1, 7))  # ScienceQA's first group of grades
MME_QUESTIONS = 2  # about each image
MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")

NO_GEOMETRY = ImageGeometry(1, 1)  # the parsers of words look at no image


def gold_texts(annotation: Annotation) -> list[str]:
    """Every accepted answer: ``gt_answers`` as a string, a number, a list of either, or a list of {"answer": ...}.

    Raises:
        DataError: It is none of these, or an empty list.
    """
    golds = annotation.gold if isinstance(annotation.gold, list) else [annotation.gold]
    texts = [gold.get("answer") if isinstance(gold, dict) else gold for gold in golds]
    if not texts or any(isinstance(text, bool) or not isinstance(text, (str, int, float)) for text in texts):
        raise DataError(f"{annotation.where}: gt_answers must be text or a list of texts, got {annotation.gold!r:.80}")
    return [str(text) for text in texts]


def _matches(records: Sequence[Record], match: Callable[[str, str], bool]) -> list[bool]:
    """Whether each answer matches one of its gold answers."""
    return [any(match(record.prediction, gold) for gold in gold_texts(record.annotation)) for record in records]


def _any_match(records: Sequence[Record], match: Callable[[str, str], bool]) -> float:
    return mean(_matches(records, match))


def _empty(records: Sequence[Record]) -> int:
    return sum(not record.prediction.strip() for record in records)


def find_letter(prediction: str) -> str | None:
    """The letter of a choice that the task's parser finds in an answer ("The answer is (B)"); None if it finds none."""
    return next(iter(tasks.create("multiple_choice").parse(prediction, NO_GEOMETRY).items), None)


def lenient_choice(prediction: str, gold: str) -> bool:
    """``choice_match``, or the task's parser finds the letter ("The answer is (B)"); other text is VQA-normalised.

    The reference's letter rule ends with E; here every capital letter alone is one.
    """
    if choice_match(prediction, gold):
        return True
    if len(gold) == 1 and gold in LETTERS:
        return find_letter(prediction) == gold
    return normalize_vqa_answer(prediction) == normalize_vqa_answer(gold)


def _by_group(
    records: Sequence[Record], scores: Sequence[float], groups: Callable[[Annotation], Sequence[str]], name: str
) -> dict[str, dict[str, float]]:
    """{name: mean score of each group}; empty where the records have no groups."""
    found: dict[str, list[float]] = {}
    for record, score in zip(records, scores, strict=True):
        for group in groups(record.annotation):
            found.setdefault(group, []).append(score)
    return {name: {group: mean(found[group]) for group in sorted(found)}} if found else {}


def _question_groups(annotation: Annotation) -> list[str]:
    """GQA's kinds of question, ScienceQA's subjects, contexts and grades; none for other files.

    Source: GQA's eval.py; github.com/lupantech/ScienceQA, tools/evaluate_acc.py.
    """
    fields = annotation.fields
    if isinstance(types := fields.get("types"), dict) and "structural" in types:
        return ["open" if types["structural"] == "query" else "binary"]
    if not isinstance(subject := fields.get("subject"), str) or not isinstance(grade := fields.get("grade"), str):
        return []
    has = {"has_text": bool(fields.get("hint")), "has_image": bool(fields.get("image"))}
    contexts = [name for name, value in has.items() if value] or ["no_context"]
    grades = ["grade_1_6" if grade in EARLY_GRADES else "grade_7_12"] if grade.startswith("grade") else []
    return [subject, *contexts, *grades]


def accuracy(records: Sequence[Record]) -> MetricResult:
    """Exact match; where the gold answer is one of A to E, the letter before the first '.'.

    ``accuracy_by_group`` is there for GQA's and ScienceQA's own files.
    Source: the benchmarks' definitions (GQA, arXiv:1902.09506; VSR, arXiv:2205.00363; AI2D, arXiv:1603.07396;
    ScienceQA, arXiv:2209.09513; Q-Bench, arXiv:2309.14181; OCR-VQA, ICDAR 2019) as LLaMA2-Accessory unifies them.
    """
    unparsable = unread = 0
    for record in records:
        letters = any(gold in OPTION_LETTERS for gold in gold_texts(record.annotation))
        head = record.prediction.split(".", 1)[0].strip().upper()
        is_unparsable = head not in OPTION_LETTERS if letters else not record.prediction.strip()
        unparsable += is_unparsable
        unread += is_unparsable and find_letter(record.prediction) is None

    def score(match: Callable[[str, str], bool]) -> dict[str, Any]:
        hits = _matches(records, match)
        return {"accuracy": mean(hits), **_by_group(records, hits, _question_groups, "accuracy_by_group")}

    return MetricResult(score(choice_match), unparsable, score(lenient_choice), unread=unread)


def classification(records: Sequence[Record]) -> MetricResult:
    """Exact match of the class; the strict value wants "This is a {class}.", the lenient one any wording.

    The gold answer is the class or the task's own answer.
    """
    task = tasks.create("classification")
    strict = lenient = unparsable = 0
    for record in records:
        golds = [task.parse(gold, NO_GEOMETRY).items for gold in gold_texts(record.annotation)]
        result = task.parse(record.prediction, NO_GEOMETRY)
        hit = bool(result.items) and any(gold and exact_match(result.items[0], gold[0]) for gold in golds)
        strict += hit and result.is_strict
        lenient += hit
        unparsable += not result.items
    count = max(len(records), 1)
    return MetricResult({"accuracy": strict / count}, unparsable, {"accuracy": lenient / count})


def vqa(records: Sequence[Record]) -> MetricResult:
    """The mean VQA accuracy; ``accuracy`` is the same number under the key that all accuracy benchmarks share.

    ``accuracy_by_answer_type`` is there where the file tells the type: yes/no, number, other.
    Source: Antol et al., VQA, arXiv:1505.00468, section 3; TextVQA, arXiv:1904.08920, and VizWiz use the same.
    """
    golds = [gold_texts(record.annotation) for record in records]
    scores = [vqa_accuracy(record.prediction, gold) for record, gold in zip(records, golds, strict=True)]
    single = sum(len(gold) == 1 for gold in golds)
    note = f"{single} questions have a single gold answer: scored by normalised equality, not by agreement with people"

    def kinds(annotation: Annotation) -> list[str]:
        kind = annotation.fields.get("answer_type")
        return [kind] if isinstance(kind, str) else []

    value = {"vqa_accuracy": mean(scores), "accuracy": mean(scores)}
    by_type = _by_group(records, scores, kinds, "accuracy_by_answer_type")
    return MetricResult(value | by_type, _empty(records), notes=(note,) if single else ())


def mean_anls(records: Sequence[Record]) -> MetricResult:
    """The mean of ``text.anls``."""
    value = mean([anls(record.prediction, gold_texts(record.annotation)) for record in records])
    return MetricResult({"anls": value}, _empty(records))


def _drop_units(text: str) -> str:
    """A number without thousands separators, currency sign and full stop."""
    bare = text.strip().lstrip("$€£").replace(",", "").removesuffix(".")
    return bare if re.fullmatch(r"[-+]?\d*\.?\d+(e[-+]?\d+)?%?", bare) else text.strip().removesuffix(".")


def relaxed_accuracy(records: Sequence[Record]) -> MetricResult:
    """ChartQA's relaxed accuracy.

    ``reference_swapped_arguments`` is what the public evaluation prints, for information: it takes the
    prediction for the gold answer and the gold answer for the prediction.
    """

    def strict(prediction: str, gold: str) -> bool:
        return relaxed_match(prediction.strip(), gold)

    def swapped(prediction: str, gold: str) -> bool:
        return relaxed_match(gold, prediction.strip())

    def lenient(prediction: str, gold: str) -> bool:
        return strict(prediction, gold) or relaxed_match(_drop_units(prediction), _drop_units(gold))

    scores = {
        "relaxed_accuracy": _any_match(records, strict),
        "reference_swapped_arguments": _any_match(records, swapped),
    }
    return MetricResult(scores, _empty(records), {"relaxed_accuracy": _any_match(records, lenient)})


def _yes_no_gold(annotation: Annotation) -> str:
    gold = gold_texts(annotation)[0].strip().lower()
    if gold not in ("yes", "no"):
        raise DataError(f"{annotation.where}: gt_answers must be yes or no, got {annotation.gold!r:.80}")
    return gold


def _mme_category(annotation: Annotation) -> str:
    """The category that is a folder of the image's path; else the last one (in MME's order) found anywhere in it."""
    names = (*MME_PERCEPTION, *MME_COGNITION)
    folders = set(re.split(r"[/\\]", annotation.image_path))
    found = [name for name in names if name in folders] or [name for name in names if name in annotation.image_path]
    if not found:
        raise DataError(
            f"{annotation.where}: no MME category in image_path {annotation.image_path!r:.80}; known: "
            f"{', '.join(names)}"
        )
    return found[-1]


def _mme_images(records: Sequence[Record]) -> dict[str, list[Record]]:
    """One category's questions by image."""
    images: dict[str, list[Record]] = {}
    for record in records:
        images.setdefault(record.annotation.image_path, []).append(record)
    return images


def _mme_score(records: Sequence[Record], read: Callable[[str], str]) -> float:
    def is_right(record: Record) -> bool:
        return read(record.prediction) == _yes_no_gold(record.annotation)

    pairs = [pair for pair in _mme_images(records).values() if len(pair) == MME_QUESTIONS]
    return 100 * (mean([is_right(each) for each in records]) + mean([all(map(is_right, pair)) for pair in pairs]))


def _mme_odd_images(groups: Mapping[str, Sequence[Record]]) -> Iterator[str]:
    """A note for each category with images that do not have exactly two questions."""
    for name, group in groups.items():
        odd = {path: len(found) for path, found in _mme_images(group).items() if len(found) != MME_QUESTIONS}
        if odd:
            path, count = next(iter(odd.items()))
            yield (
                f"category {name} has {len(odd)} images that do not have exactly two questions; accuracy+ leaves them "
                f"out; the first is {path} with {count}"
            )


def _lenient_yes_no(prediction: str) -> str:
    if (read := read_yes_no(prediction)) != "other":
        return read
    words = re.findall(r"[a-z]+", prediction.lower())
    return next((word for word in words if word in ("yes", "no")), "other")


def mme(records: Sequence[Record]) -> MetricResult:
    """MME: per category 100 * (accuracy + accuracy+), summed over the perception and the cognition categories.

    Accuracy+ is the share of images both of whose questions are right; images that do not have exactly two questions
    are left out of it, and a note says so.
    Source: Fu et al., MME, arXiv:2306.13394, section 2.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(_mme_category(record.annotation), []).append(record)

    def score(read: Callable[[str], str]) -> dict[str, Any]:
        categories = {name: _mme_score(group, read) for name, group in groups.items()}
        return {
            "perception": sum(categories.get(name, 0.0) for name in MME_PERCEPTION),
            "cognition": sum(categories.get(name, 0.0) for name in MME_COGNITION),
            "categories": categories,
        }

    notes = [f"category {name} is absent" for name in (*MME_PERCEPTION, *MME_COGNITION) if name not in groups]
    notes += _mme_odd_images(groups)
    unparsable = sum(read_yes_no(record.prediction) == "other" for record in records)
    return MetricResult(score(read_yes_no), unparsable, score(_lenient_yes_no), tuple(notes))


def pope(records: Sequence[Record]) -> MetricResult:
    """POPE: accuracy, precision, recall and F1 of "yes", and the share of "yes".

    Source: Li et al., POPE, arXiv:2305.10355, section 5.
    """
    outcomes = [(read_pope(record.prediction) == "yes", _yes_no_gold(record.annotation) == "yes") for record in records]
    both = sum(said and true for said, true in outcomes)
    said_yes, true_yes = sum(said for said, _ in outcomes), sum(true for _, true in outcomes)
    scores = {
        "accuracy": mean([said == true for said, true in outcomes]),
        "precision": both / said_yes if said_yes else 0.0,
        "recall": both / true_yes if true_yes else 0.0,
        "f1": 2 * both / (said_yes + true_yes) if said_yes + true_yes else 0.0,
        "yes_ratio": said_yes / len(outcomes) if outcomes else 0.0,
    }
    return MetricResult(scores, _empty(records), notes=("an answer without no or not counts as yes, as POPE has it",))


def caption(records: Sequence[Record]) -> MetricResult:
    """Sentences: BLEU-1 to 4, CIDEr-D, and ``exact``, the share that equals a gold sentence (case and '.' aside)."""
    predictions = [record.prediction for record in records]
    golds = [gold_texts(record.annotation) for record in records]
    scores = {"cider": cider(predictions, golds), **bleu(predictions, golds), "exact": _any_match(records, exact_match)}
    return MetricResult(scores, _empty(records))
