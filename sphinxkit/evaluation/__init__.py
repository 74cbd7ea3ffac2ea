"""Scores: metrics by name, benchmarks by name, and the reading of annotations and predictions."""

from sphinxkit.evaluation.benchmarks import BENCHMARKS, Benchmark, Report, score
from sphinxkit.evaluation.inputs import Annotation, Predictions, Record, read_annotations, read_predictions
from sphinxkit.evaluation.result import Metric, MetricResult

__all__ = [
    "BENCHMARKS",
    "Annotation",
    "Benchmark",
    "Metric",
    "MetricResult",
    "Predictions",
    "Record",
    "Report",
    "read_annotations",
    "read_predictions",
    "score",
]
