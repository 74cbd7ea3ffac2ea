"""Greedy answers to the questions of a benchmark, in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sphinxkit.batch_inference import Request, answer_requests
from sphinxkit.errors import DataError
from sphinxkit.evaluation import benchmarks
from sphinxkit.evaluation.annotation import Annotation
from sphinxkit.evaluation.benchmarks import Benchmark
from sphinxkit.evaluation.questions import Question, check_images, make_questions
from sphinxkit.generation import Sampling

if TYPE_CHECKING:
    from sphinxkit.formatters import ConversationTemplate
    from sphinxkit.sphinx_model import SphinxModel

BATCH_SIZE = 8  # our choice


@dataclass(frozen=True, slots=True)
class Prediction:
    """One answer.

    Args:
        question: The question.
        answer: The stripped answer; "" after an error.
        finish_reason: See ``generation.Generation``; "error" if the question failed.
        error: Why the question failed: unreadable image, over-long prompt.
    """

    question: Question
    answer: str
    finish_reason: str
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """A line of the predictions file."""
        fields: dict[str, Any] = {
            "key": self.question.key,
            "question_id": self.question.question_id,
            "answer": self.answer,
            "finish_reason": self.finish_reason,
        }
        return fields if self.error is None else fields | {"error": self.error}


def predict(
    model: SphinxModel,
    benchmark: str | Benchmark,
    annotations: str | Path | Sequence[Annotation],
    images: str | Path,
    *,
    batch_size: int = BATCH_SIZE,
    max_new_tokens: int | None = None,
    strip_prefix: str = "",
) -> Iterator[Prediction]:
    """Greedy answers to every question of a benchmark, one by one, in the annotations' order.

    Args:
        model: The model.
        benchmark: Name of a benchmark or a task, or a benchmark.
        annotations: A file (see ``inputs.read_annotations``) or its parsed annotations.
        images: Base folder of image paths.
        batch_size: Number of questions decoded together.
        max_new_tokens: Longest answer; None: the benchmark's.
        strip_prefix: See ``questions.make_questions``.
    Raises:
        DataError: Unknown benchmark, unusable annotations, a folder without any of the images, or a model without
            template, tokenizer or (for images) vision tower. A bad image or prompt is an error of its prediction alone.
    """
    chosen = choose_benchmark(benchmark, max_new_tokens)
    golds = annotations if isinstance(annotations, Sequence) and not isinstance(annotations, str) else None
    given = chosen.read(str(annotations)) if golds is None else golds
    questions = make_questions(chosen, given, images, require_template(model), strip_prefix)
    check_images(questions, images)
    waiting: dict[int, Prediction] = {}
    following = 0
    for prediction in ask(model, questions, chosen.max_new_tokens, batch_size):
        waiting[prediction.question.index] = prediction
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def ask(
    model: SphinxModel, questions: Sequence[Question], max_new_tokens: int, batch_size: int = BATCH_SIZE
) -> Iterator[Prediction]:
    """Greedy answers to questions, in order of completion.

    A failed question gives a prediction with an error.

    Args:
        model: The model.
        questions: See ``questions.make_questions``.
        max_new_tokens: Longest answer.
        batch_size: Number of questions decoded together.
    Raises:
        DataError: The batch size is not positive, or the model lacks template, tokenizer or vision tower.
    """
    template = require_template(model)
    if model.tokenizer is None:
        raise DataError("this model has no tokenizer: it cannot be asked")
    if model.vision is None and any(question.image is not None for question in questions):
        raise DataError("this model has no vision tower, but the questions are about images")
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=0.0, stop=template.stop)
    requests = (Request(place, each.prompt, each.image, sampling) for place, each in enumerate(questions))
    for answered in answer_requests(model, requests, batch_size=batch_size):
        question, generation = questions[answered.request.index], answered.generation
        if generation is None:
            yield Prediction(question, "", "error", answered.error)
        else:
            yield Prediction(question, generation.text.strip(), generation.finish_reason)


def require_template(model: SphinxModel) -> ConversationTemplate:
    """The model's conversation template.

    Raises:
        DataError: It has none.
    """
    if model.conversation is None:
        raise DataError("this model has no conversation template: set model.conversation")
    return model.conversation


def choose_benchmark(benchmark: str | Benchmark, max_new_tokens: int | None) -> Benchmark:
    """Find a benchmark by name; optionally override its maximum answer length.

    Raises:
        DataError: There is none of this name.
    """
    chosen = benchmarks.get(benchmark) if isinstance(benchmark, str) else benchmark
    return chosen if max_new_tokens is None else dataclasses.replace(chosen, max_new_tokens=max_new_tokens)
