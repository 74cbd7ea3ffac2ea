"""Metrics by name.

``registry`` maps the names that benchmarks and tasks use to functions ``(records) -> MetricResult``: strict scores by
the benchmark's own rules, lenient scores by the tolerant parser, and the number of answers that could not be parsed.
"""

from __future__ import annotations

from collections.abc import Sequence

from sphinxkit.evaluation import choice_metrics, region_metrics, text_metrics
from sphinxkit.evaluation.annotation import Record
from sphinxkit.evaluation.captions import bleu, cider
from sphinxkit.evaluation.coco_eval import average_precision, keypoint_precision
from sphinxkit.evaluation.regions import MatchCounts, match_boxes, oks, pck, read_box_strictly
from sphinxkit.evaluation.result import Metric, MetricResult
from sphinxkit.evaluation.text import anls, choice_match, exact_match, letter_match, levenshtein, relaxed_match
from sphinxkit.evaluation.vqa import normalize_vqa_answer, vqa_accuracy
from sphinxkit.registry import Registry

__all__ = [
    "MatchCounts",
    "Metric",
    "MetricResult",
    "anls",
    "average_precision",
    "bleu",
    "choice_match",
    "cider",
    "exact_match",
    "get",
    "keypoint_precision",
    "letter_match",
    "levenshtein",
    "match_boxes",
    "names",
    "normalize_vqa_answer",
    "oks",
    "pck",
    "read_box_strictly",
    "register",
    "registry",
    "relaxed_match",
    "score",
    "vqa_accuracy",
]

registry: Registry[MetricResult] = Registry(
    "metric",
    {
        "accuracy": text_metrics.accuracy,
        "classification_accuracy": text_metrics.classification,
        "vqa_accuracy": text_metrics.vqa,
        "anls": text_metrics.mean_anls,
        "relaxed_accuracy": text_metrics.relaxed_accuracy,
        "aokvqa_choice": choice_metrics.aokvqa_choice,
        "aokvqa_direct": choice_metrics.aokvqa_direct,
        "mmbench": choice_metrics.mmbench,
        "mme": text_metrics.mme,
        "pope": text_metrics.pope,
        "caption": text_metrics.caption,
        "precision_at_1": region_metrics.precision_at_1,
        "detection_f1": region_metrics.detection("detection"),
        "layout_f1": region_metrics.detection("layout"),
        "layout_f1_doclaynet": region_metrics.detection("layout", classes="doclaynet"),
        "text_detection_f1": region_metrics.text_spotting,
        "grounded_recall": region_metrics.phrase_recall("grounded_caption"),
        "relation_recall": region_metrics.phrase_recall("relation"),
        "pck": region_metrics.pose,
    },
)
register = registry.register
names = registry.names


def get(name: str) -> Metric:
    """The metric called ``name``.

    Raises:
        RegistryError: There is none; the message lists the known names.
    """
    return registry.get(name)


def score(name: str, records: Sequence[Record]) -> MetricResult:
    """Score records with the metric called ``name``.

    Raises:
        RegistryError: There is no such metric.
        DataError: A gold answer is not what the metric takes; names file and line.
    """
    return get(name)(records)
