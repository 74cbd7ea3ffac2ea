"""Evaluation: metrics, benchmarks, and readers of annotations and predictions."""

from sphinxkit.evaluation.annotation import Annotation, Record
from sphinxkit.evaluation.benchmarks import BENCHMARKS, Benchmark, Report, score
from sphinxkit.evaluation.inputs import Predictions, read_annotations, read_predictions
from sphinxkit.evaluation.predictions import Prediction, predict
from sphinxkit.evaluation.questions import Question, make_questions
from sphinxkit.evaluation.result import Metric, MetricResult
from sphinxkit.evaluation.run import evaluate

__all__ = [
    "BENCHMARKS",
    "Annotation",
    "Benchmark",
    "Metric",
    "MetricResult",
    "Prediction",
    "Predictions",
    "Question",
    "Record",
    "Report",
    "evaluate",
    "make_questions",
    "predict",
    "read_annotations",
    "read_predictions",
    "score",
]
