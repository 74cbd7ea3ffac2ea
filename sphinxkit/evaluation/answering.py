"""Have a model answer a benchmark's questions: prompts, greedy answers, a file that can be resumed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sphinxkit.atomic import atomic_file
from sphinxkit.data.json_stream import iter_json_lines
from sphinxkit.errors import DataError
from sphinxkit.evaluation.benchmarks import Benchmark
from sphinxkit.evaluation.inputs import Annotation, manifest_path
from sphinxkit.formatters import tasks
from sphinxkit.formatters.conversation import ConversationTemplate
from sphinxkit.geometry import Box

WITHOUT_QUESTION = frozenset(
    ("caption", "detailed_caption", "grounded_caption", "text_detection", "chart", "layout", "classification")
)
ABOUT_A_BOX = frozenset(("reg", "pose"))

Progress = Callable[[int, int], None]


class Answer(Protocol):
    """What a model gives for one prompt; ``sphinxkit.generation.Generation`` is one."""

    @property
    def text(self) -> str:
        """The answer."""
        ...


class AnsweringModel(Protocol):
    """What answers; ``sphinxkit.SphinxModel`` is one."""

    conversation: ConversationTemplate | None

    def generate(
        self,
        prompts: Sequence[str],
        images: Sequence[Path],
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        stop: Sequence[str],
    ) -> Sequence[Answer]:
        """One answer per prompt."""
        ...


def instruction(benchmark: Benchmark, annotation: Annotation) -> str:
    """What a question is put as: the benchmark's task words it; without a task the question is the instruction.

    Args:
        benchmark: The benchmark.
        annotation: Its question; for ``reg`` and ``pose`` with ``box`` [x1, y1, x2, y2] in original pixels.
    Raises:
        DataError: The question is empty, or the box is missing or outside the image; names file and line.
    """
    if not benchmark.task:
        if not annotation.question.strip():
            raise DataError(f"{annotation.where}: the question is empty")
        return annotation.question
    task = tasks.create(benchmark.task, **dict(benchmark.task_options))
    try:
        if benchmark.task in ABOUT_A_BOX:
            values = annotation.fields.get("box")
            if not isinstance(values, list) or len(values) != 4:
                raise DataError(f"'box' must be [x1, y1, x2, y2], got {values!r:.60}")
            return task.prompt(Box(*map(float, values)), annotation.geometry)
        if benchmark.task in WITHOUT_QUESTION:
            return task.prompt()
        return task.prompt(annotation.question)
    except DataError as error:
        raise DataError(f"{annotation.where}: {error}") from error


def _answered(output: Path, annotations: Sequence[Annotation]) -> int:
    """How many questions an earlier run answered; a line that was cut off is removed."""
    if not output.exists():
        return 0
    content = output.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        output.write_bytes(whole)
    items = list(iter_json_lines(output))
    if len(items) > len(annotations):
        raise DataError(f"{output}: {len(items)} answers for {len(annotations)} questions; is it another benchmark's?")
    for item, annotation in zip(items, annotations, strict=False):
        found = item.value.get("question_id") if isinstance(item.value, dict) else None
        if found != annotation.question_id:
            raise DataError(
                f"{output}:{item.line}: question_id {found!r} where {annotation.where} has {annotation.question_id!r}; "
                "the file is not of this benchmark"
            )
    return len(items)


def _check_manifest(output: Path, manifest: Mapping[str, Any]) -> None:
    path = manifest_path(output)
    if output.exists() and path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        differing = sorted(key for key in {*before, *manifest} if before.get(key) != manifest.get(key))
        if differing:
            raise DataError(
                f"{output}: its answers were made otherwise ({', '.join(differing)} differ, see {path.name}); "
                "choose another output"
            )
        return
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")


def answer_questions(
    model: AnsweringModel,
    benchmark: Benchmark,
    annotations: Sequence[Annotation],
    images: str | Path,
    output: str | Path,
    *,
    batch_size: int = 8,
    manifest: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> int:
    """Answer every question greedily, writing ``{question_id, answer}`` lines as they come.

    An output that is there already is gone on with: the questions it answers are not asked again.

    Args:
        model: What answers.
        benchmark: How the questions are put.
        annotations: The questions.
        images: Folder that ``image_path`` is relative to.
        output: JSON lines, in the annotations' order; beside it ``<output>.manifest.json``.
        batch_size: Questions per call.
        manifest: How the answers are made; the template and the decoding are added.
        progress: Called with (answered, all) after every batch.
    Returns:
        How many questions were asked now.
    Raises:
        DataError: The output is of another benchmark or was made otherwise, the model has no template, an image is
            missing or a question cannot be put.
    """
    if model.conversation is None:
        raise DataError("evaluate: the model has no conversation template")
    if batch_size < 1:
        raise DataError(f"evaluate: batch_size must be at least 1, got {batch_size}")
    output, root, template = Path(output), Path(images), model.conversation
    decoding = {"temperature": 0.0, "max_new_tokens": benchmark.max_new_tokens, "stop": list(template.stop)}
    _check_manifest(output, {**(manifest or {}), "template": template.name, "decoding": decoding})
    done = first = _answered(output, annotations)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a", encoding="utf-8") as file:
        while done < len(annotations):
            batch = annotations[done : done + batch_size]
            paths = [root / annotation.image_path for annotation in batch]
            for annotation, path in zip(batch, paths, strict=True):
                if not path.is_file():
                    raise DataError(f"{annotation.where}: there is no image {path}")
            prompts = [
                template.prompt(
                    [{"role": "user", "content": instruction(benchmark, annotation)}], benchmark.answer_start
                )
                for annotation in batch
            ]
            answers = model.generate(
                prompts, paths, max_new_tokens=benchmark.max_new_tokens, temperature=0.0, top_p=1.0, stop=template.stop
            )
            for annotation, answer in zip(batch, answers, strict=True):
                line = {"question_id": annotation.question_id, "answer": answer.text.strip()}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            done += len(batch)
            if progress is not None:
                progress(done, len(annotations))
    return done - first
