"""Ask a model every question of a benchmark, in a file that a killed run goes on from, and score its answers.

Beside the predictions ``NAME.jsonl`` stands ``NAME.jsonl.manifest.json``: what was asked of which model, and how. A run
goes on only where its own manifest says the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sphinxkit.atomic import atomic_file
from sphinxkit.errors import DataError
from sphinxkit.evaluation import benchmarks, metrics
from sphinxkit.evaluation.benchmarks import Benchmark, Report
from sphinxkit.evaluation.inputs import Annotation, Record, manifest_path, read_annotations
from sphinxkit.evaluation.questions import Question, check_images, hash_prompts, make_questions
from sphinxkit.tensor_files.checksums import file_sha256
from sphinxkit.version import __version__

if TYPE_CHECKING:
    from PIL.Image import Image

    from sphinxkit.formatters import ConversationTemplate
    from sphinxkit.generation import Generation
    from sphinxkit.sphinx_model import SphinxModel

BATCH_SIZE = 8  # our choice
SAMPLED_VALUES = 64  # of every tensor in a fingerprint: training changes nearly all of them (our choice)
RUN = "run"  # the part of a manifest that may differ when a run goes on


class AnsweringModel(Protocol):
    """What is needed of a model; ``sphinxkit.sphinx_model.SphinxModel`` is one."""

    @property
    def tokenizer(self) -> object:
        """Not None."""

    @property
    def vision(self) -> object:
        """Not None where questions have images."""

    @property
    def conversation(self) -> ConversationTemplate | None:
        """The template of its prompts."""

    def generate(
        self,
        prompts: Sequence[str],
        images: Sequence[Image | None],
        *,
        max_new_tokens: int,
        temperature: float,
        stop: Sequence[str],
    ) -> list[Generation]:
        """One answer for each prompt, in order; DataError for a prompt or an image that cannot be used."""
        ...


@dataclass(frozen=True, slots=True)
class Prediction:
    """One answer.

    Args:
        question: What was asked.
        answer: The model's words without the white space around them; "" where there is an error.
        finish_reason: See ``generation.Generation``; "error" where the model was not asked.
        error: Why it was not: an image that cannot be read, a prompt that is too long.
    """

    question: Question
    answer: str
    finish_reason: str
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """As a line of the predictions file holds it."""
        fields: dict[str, Any] = {
            "key": self.question.key,
            "question_id": self.question.question_id,
            "answer": self.answer,
            "finish_reason": self.finish_reason,
        }
        return fields if self.error is None else fields | {"error": self.error}


def predict(
    model: AnsweringModel,
    benchmark: str | Benchmark,
    annotations: str | Path | Sequence[Annotation],
    images: str | Path,
    *,
    batch_size: int = BATCH_SIZE,
    max_new_tokens: int | None = None,
    strip_prefix: str = "",
) -> Iterator[Prediction]:
    """Greedy answers to every question of a benchmark, one by one, in order; nothing is written.

    Args:
        model: The model.
        benchmark: A benchmark's or a task's name, or a benchmark.
        annotations: A file (see ``inputs.read_annotations``) or what was read from one.
        images: Folder that image paths are relative to.
        batch_size: Questions that are asked at once.
        max_new_tokens: Longest answer; None: the benchmark's.
        strip_prefix: See ``questions.make_questions``.
    Raises:
        DataError: Unknown benchmark, unusable annotations, a folder without any of the images, or a model without
            template, tokenizer or (for images) vision tower. A single bad image or prompt is told in its prediction.
    """
    chosen = _chosen(benchmark, max_new_tokens)
    golds = annotations if isinstance(annotations, Sequence) and not isinstance(annotations, str) else None
    given = read_annotations(str(annotations)) if golds is None else golds
    questions = make_questions(chosen, given, images, _template(model), strip_prefix)
    check_images(questions, images)
    yield from ask(model, questions, chosen.max_new_tokens, batch_size)


def ask(
    model: AnsweringModel, questions: Sequence[Question], max_new_tokens: int, batch_size: int = BATCH_SIZE
) -> Iterator[Prediction]:
    """Greedy answers to questions, in order; what cannot be asked is told in its own place.

    Args:
        model: The model.
        questions: See ``questions.make_questions``.
        max_new_tokens: Longest answer.
        batch_size: Questions that are asked at once.
    Raises:
        DataError: The batch size is not positive, or the model lacks template, tokenizer or vision tower.
    """
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1, got {batch_size}")
    template = _template(model)
    if model.tokenizer is None:
        raise DataError("this model has no tokenizer: it cannot be asked")
    if model.vision is None and any(question.image is not None for question in questions):
        raise DataError("this model has no vision tower, but the questions are about images")

    def generate(batch: Sequence[tuple[Question, Image | None]]) -> list[Prediction]:
        answers = model.generate(
            [question.prompt for question, _ in batch],
            [image for _, image in batch],
            max_new_tokens=max_new_tokens,
            temperature=0.0,
            stop=template.stop,
        )
        return [
            Prediction(question, answer.text.strip(), answer.finish_reason)
            for (question, _), answer in zip(batch, answers, strict=True)
        ]

    for start in range(0, len(questions), batch_size):
        yield from _ask_batch(questions[start : start + batch_size], generate)


def _ask_batch(
    questions: Sequence[Question], generate: Callable[[Sequence[tuple[Question, Image | None]]], list[Prediction]]
) -> list[Prediction]:
    """The answers in the questions' order. A batch that the model refuses is asked again one by one."""
    found: dict[int, Prediction] = {}
    batch: list[tuple[Question, Image | None]] = []
    for question in questions:
        try:
            batch.append((question, _open(question)))
        except DataError as error:
            found[question.index] = Prediction(question, "", "error", str(error))
    try:
        answers = generate(batch) if batch else []
    except DataError:
        answers = []
        for pair in batch:
            try:
                answers += generate([pair])
            except DataError as error:
                answers.append(Prediction(pair[0], "", "error", str(error)))
    found |= {answer.question.index: answer for answer in answers}
    return [found[question.index] for question in questions]


def _open(question: Question) -> Image | None:
    from sphinxkit.tilers.images import load_image

    return None if question.image is None else load_image(question.image)


def _template(model: AnsweringModel) -> ConversationTemplate:
    if model.conversation is None:
        raise DataError("this model has no conversation template: set model.conversation")
    return model.conversation


def _chosen(benchmark: str | Benchmark, max_new_tokens: int | None) -> Benchmark:
    chosen = benchmarks.get(benchmark) if isinstance(benchmark, str) else benchmark
    return chosen if max_new_tokens is None else dataclasses.replace(chosen, max_new_tokens=max_new_tokens)


# -- files ------------------------------------------------------------------------------------------------------------


def describe(model: SphinxModel) -> dict[str, str]:
    """What tells one model from another: a hash of values of every tensor, and of recipe and tokenizer.

    Args:
        model: Its weights are read at ``SAMPLED_VALUES`` places of every tensor, so that this takes seconds at most.
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        values = tensor.detach().flatten()
        some = values[:: max(1, len(values) // SAMPLED_VALUES)].cpu().contiguous()
        digest.update(some.view(torch.uint8).numpy().tobytes())
    tokenizer = b"" if model.tokenizer is None else model.tokenizer.to_bytes()
    return {
        "weights": digest.hexdigest(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "recipe": hashlib.sha256((model.recipe_yaml or "").encode()).hexdigest(),
        "tokenizer": hashlib.sha256(tokenizer).hexdigest(),
    }


def evaluate(
    model: AnsweringModel,
    benchmark: str,
    annotations: str | Path,
    images: str | Path,
    output: str | Path,
    *,
    model_facts: Mapping[str, Any],
    batch_size: int = BATCH_SIZE,
    max_new_tokens: int | None = None,
    strip_prefix: str = "",
    run_facts: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Ask a model every question of a benchmark that it has not answered yet, then score all answers.

    Every answer is a line of ``output`` (JSON lines of ``{key, question_id, answer, finish_reason}``, which ``sphinxkit
    score`` reads), written when it comes. A run that was stopped goes on behind its last whole line; questions with an
    error (their image could not be read) are asked again, and until then scored as empty answers.

    Args:
        model: The model.
        benchmark: A benchmark's or a task's name.
        annotations: See ``inputs.read_annotations``.
        images: Folder that image paths are relative to.
        output: The predictions file.
        model_facts: What tells this model from others (``describe``); a run with other facts is not gone on with.
        batch_size: Questions that are asked at once.
        max_new_tokens: Longest answer; None: the benchmark's.
        strip_prefix: See ``questions.make_questions``.
        run_facts: Further facts for the manifest (the model's path); they may differ when a run goes on.
        progress: Called with (questions done, questions in all).
    Raises:
        DataError: As ``predict``; a gold answer that the metric does not take (before the model is asked anything);
            ``output`` is there without a manifest, with one of another run, or damaged.
    """
    chosen = _chosen(benchmark, max_new_tokens)
    output = Path(output)
    golds = read_annotations(annotations)
    questions = make_questions(chosen, golds, images, _template(model), strip_prefix)
    check_images(questions, images)
    metrics.score(chosen.metric, [Record(gold, "") for gold in golds])
    manifest = _manifest(chosen, _template(model), questions, annotations, model_facts)
    manifest[RUN] = {**(run_facts or {}), "images": str(images), "batch_size": batch_size, "versions": _versions()}
    output.parent.mkdir(parents=True, exist_ok=True)
    manifest = _begin(output, manifest)
    lines = _read_lines(output, questions)
    rest = [question for question in questions if question.index not in lines]
    is_in_order = not lines or not rest or max(lines) < rest[0].index
    with output.open("ab") as file:
        for prediction in ask(model, rest, chosen.max_new_tokens, batch_size):
            line = json.dumps(prediction.as_dict()).encode() + b"\n"
            file.write(line)
            file.flush()
            lines[prediction.question.index] = line
            if progress is not None:
                progress(len(lines), len(questions))
        os.fsync(file.fileno())
    if not is_in_order:
        _write_lines(output, lines)
    return _report(chosen, annotations, output, manifest, lines)


def _versions() -> dict[str, str]:
    import torch

    return {"sphinxkit": __version__, "torch": torch.__version__, "python": platform.python_version()}


def _manifest(
    benchmark: Benchmark,
    template: ConversationTemplate,
    questions: Sequence[Question],
    annotations: str | Path,
    model_facts: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "benchmark": benchmark.name,
        "task": benchmark.task,
        "annotations": {"sha256": file_sha256(annotations), "count": len(questions)},
        "template": template.name,
        "prompts": {"sha256": hash_prompts(questions), "first": questions[0].prompt},
        "decoding": {
            "method": "greedy",
            "max_new_tokens": benchmark.max_new_tokens,
            "stop": list(template.stop),
        },
        "model": dict(model_facts),
    }


def _differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """Every leaf in which two manifests differ, as "model.weights was 'a', now 'b'"."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            path = f"{name}.{key}" if name else str(key)
            if path != RUN:
                yield from _differences(old.get(key), new.get(key), path)
    elif old != new:
        yield f"{name} was {old!r:.100}, now {new!r:.100}"


def _begin(output: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest of a new run; of an old one, check that it is the same run, and return what it says."""
    path = manifest_path(output)
    if not output.exists() or not output.stat().st_size:
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        return manifest
    if not path.exists():
        raise DataError(
            f"{output} exists, but {path.name} does not: nobody knows what answered it; name another output or delete "
            "it"
        )
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the manifest cannot be read: {error}") from error
    # as JSON holds it: tuples are lists there
    different = list(_differences(old, json.loads(json.dumps(manifest))))
    if different:
        raise DataError(
            f"{output} was begun by another run: {'; '.join(different)}. Name another output, or delete it and "
            f"{path.name}"
        )
    return dict(old)


def _read_lines(output: Path, questions: Sequence[Question]) -> dict[int, bytes]:
    """The lines of answered questions by index, in order. What else is in the file is taken out of it.

    That is a last line that was cut off, and questions with an error.
    """
    if not output.exists():
        return {}
    lines: dict[int, bytes] = {}
    data = output.read_bytes()
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
            index = int(row["key"].split(":", 1)[0])
            is_known = 0 <= index < len(questions) and questions[index].key == row["key"]
            is_answer = "error" not in row and isinstance(row["answer"], str)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{output}:{number}: not a line of this run's ({error!r}); delete the line") from error
        if not is_known or index in lines:
            raise DataError(f"{output}:{number}: key {row['key']!r} is unknown or there twice; delete the line")
        if is_answer:
            lines[index] = line
    lines = dict(sorted(lines.items()))
    if b"".join(lines.values()) != data:
        _write_lines(output, lines)
    return lines


def _write_lines(output: Path, lines: Mapping[int, bytes]) -> None:
    with atomic_file(output) as temporary:
        temporary.write_bytes(b"".join(lines[index] for index in sorted(lines)))


def _report(
    benchmark: Benchmark,
    annotations: str | Path,
    output: Path,
    manifest: Mapping[str, Any],
    lines: Mapping[int, bytes],
) -> Report:
    """The scores, with what was asked and how many questions could not be."""
    report = benchmarks.score(benchmark.name, annotations, output)
    rows = [json.loads(line) for line in lines.values()]
    errors = [f"{row['key']}: {row['error']}" for row in rows if "error" in row]
    facts = {
        **manifest,
        "finish_reasons": dict(Counter(row["finish_reason"] for row in rows)),
        "errors": len(errors),
    }
    notes = report.notes
    if errors:
        notes += (
            f"{len(errors)} of {len(rows)} questions could not be asked and count as empty answers; the first is "
            f"{errors[0]}",
        )
    return dataclasses.replace(report, notes=notes, manifest=report.manifest | {"generation": facts})
