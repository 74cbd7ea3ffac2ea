"""Runs a benchmark: answers every question, writes a resumable file, and scores it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sphinxkit.atomic import atomic_file, named_errors
from sphinxkit.batch_inference import fingerprint
from sphinxkit.errors import DataError
from sphinxkit.evaluation import benchmarks, metrics
from sphinxkit.evaluation.annotation import Record
from sphinxkit.evaluation.benchmarks import Benchmark, Report
from sphinxkit.evaluation.manifest import make_manifest, open_manifest
from sphinxkit.evaluation.predictions import BATCH_SIZE, ask, choose_benchmark, require_template
from sphinxkit.evaluation.questions import Question, check_images, make_questions
from sphinxkit.hub import name_in_record
from sphinxkit.recipe.io import load

if TYPE_CHECKING:
    from sphinxkit.sphinx_model import SphinxModel


def evaluate(
    model: SphinxModel | str | Path,
    benchmark: str,
    annotations: str | Path,
    images: str | Path,
    output: str | Path | None = None,
    *,
    batch_size: int = BATCH_SIZE,
    max_new_tokens: int | None = None,
    strip_prefix: str = "",
    withhold_images: bool = False,
    run_facts: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Answer all unanswered questions of a benchmark, then score all answers.

    Every answer is a line of ``output`` (JSON lines of ``{key, question_id, answer, finish_reason}``, which ``score``
    reads), written as soon as it is complete. ``OUTPUT.manifest.json`` records model, questions and settings. A stopped
    run resumes after its last whole line. Failed questions (unreadable image) count as empty answers; the next run asks
    them again.

    Args:
        model: A model, or a checkpoint (a directory or ``hf://org/repo``), which is loaded on the CPU in float32.
        benchmark: Name of a benchmark or a task.
        annotations: See ``inputs.read_annotations``.
        images: Base folder of image paths.
        output: The predictions file; None: ``BENCHMARK.predictions.jsonl``.
        batch_size: Number of questions decoded together.
        max_new_tokens: Longest answer; None: the benchmark's.
        strip_prefix: See ``questions.make_questions``.
        withhold_images: Ask without images, to measure what the questions alone reveal.
        run_facts: Further facts for the manifest (the model's path); they may change on resume.
        progress: Called with (answered questions, all questions).
    Raises:
        DataError: As ``predictions.predict``; a gold answer that the metric does not take (before the model is asked
            anything); ``output`` is no regular file, exists without a manifest, with one of another run, or is damaged.
    """
    chosen = choose_benchmark(benchmark, max_new_tokens)
    facts = dict(run_facts or {})
    if isinstance(model, str | Path):
        facts = {"model": name_in_record(model)} | facts
        model = load(model)
    place = Path(f"{chosen.name}.predictions.jsonl" if output is None else output)
    if place.exists() and not place.is_file():
        raise DataError(f"{place}: is no regular file; the answers are read from it again to be scored")
    golds = chosen.read(annotations)
    questions = make_questions(chosen, golds, images, require_template(model), strip_prefix)
    check_images(questions, images)
    metrics.score(chosen.metric, [Record(gold, "") for gold in golds])
    facts |= {"images": str(images), "batch_size": batch_size}
    manifest = make_manifest(chosen, require_template(model), questions, annotations, fingerprint(model), facts)
    if withhold_images:
        questions = [dataclasses.replace(question, image=None) for question in questions]
        manifest["withhold_images"] = True
    with named_errors(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        manifest = open_manifest(place, manifest)
        lines = _read_lines(place, questions)
    rest = [question for question in questions if question.index not in lines]
    with named_errors(place), place.open("ab") as file:
        for prediction in ask(model, rest, chosen.max_new_tokens, batch_size):
            line = json.dumps(prediction.to_dict()).encode() + b"\n"
            file.write(line)
            file.flush()
            lines[prediction.question.index] = line
            if progress is not None:
                progress(len(lines), len(questions))
        os.fsync(file.fileno())
    if list(lines) != sorted(lines):
        _write_lines(place, lines)
    return _report(chosen, annotations, place, manifest, lines)


def _read_lines(output: Path, questions: Sequence[Question]) -> dict[int, bytes]:
    """The lines of answered questions by index, in the file's order. All else is removed from the file.

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
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{output}:{number}: not a line of this run ({error!r}); delete the line") from error
        if not is_known or index in lines:
            raise DataError(f"{output}:{number}: key {row['key']!r} is unknown or there twice; delete the line")
        if is_answer:
            lines[index] = line
    if b"".join(lines.values()) != data:
        _write_lines(output, lines)
        return dict(sorted(lines.items()))
    return lines


def _write_lines(output: Path, lines: Mapping[int, bytes]) -> None:
    with named_errors(output), atomic_file(output) as temporary:
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
    rows = [json.loads(lines[index]) for index in sorted(lines)]
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
