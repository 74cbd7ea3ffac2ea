"""Makes the questions of a benchmark: one prompt and one image per annotation."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sphinxkit.errors import DataError
from sphinxkit.evaluation.annotation import Annotation
from sphinxkit.evaluation.benchmarks import Benchmark
from sphinxkit.evaluation.region_metrics import gold_box
from sphinxkit.formatters import tasks
from sphinxkit.geometry import Box
from sphinxkit.tilers import image_below

if TYPE_CHECKING:
    from sphinxkit.formatters import ConversationTemplate


@dataclass(frozen=True, slots=True)
class Question:
    """One question as model input.

    Args:
        index: Index in the annotations.
        question_id: The benchmark's id; not always unique.
        prompt: Raw text in the model's template.
        image: The image's path, or None.
    """

    index: int
    question_id: str | int
    prompt: str
    image: Path | None

    @property
    def key(self) -> str:
        """Key of the question, unique in its file (question ids may repeat)."""
        return f"{self.index}:{self.question_id}"


def make_questions(
    benchmark: Benchmark,
    annotations: Sequence[Annotation],
    images: str | Path,
    template: ConversationTemplate,
    strip_prefix: str = "",
) -> list[Question]:
    """The prompts of a benchmark, in the annotations' order.

    The instruction of the benchmark's task is filled in from the annotation. The arguments ``question``, ``phrase`` and
    ``category`` of the task's ``prompt`` are the annotation's fields of that name, else its question; ``box`` and
    ``choices`` are its fields; ``geometry`` is its image size. Without a task, the question is the whole instruction.

    Args:
        benchmark: See ``benchmarks.get``.
        annotations: See ``inputs.read_annotations``.
        images: Base folder of image paths.
        template: Conversation template.
        strip_prefix: Prefix to remove from every image path ("data/coco/").
    Raises:
        DataError: An annotation lacks what the prompt needs, or an image path lacks the prefix; names file and line.
    """
    task = tasks.create(benchmark.task, **dict(benchmark.task_options)) if benchmark.task else None
    start = benchmark.answer_start or (task.answer_start if task is not None else "")
    found = []
    for index, annotation in enumerate(annotations):
        try:
            instruction = annotation.question if task is None else fill_in(task, annotation)
            prompt = template.prompt([{"role": "user", "content": instruction}], start)
        except DataError as error:
            where = "" if str(error).startswith(annotation.where) else f"{annotation.where}: "
            raise DataError(f"{where}{error}") from error
        image = _image(annotation, Path(images), strip_prefix)
        found.append(Question(index, annotation.question_id, prompt, image))
    return found


def _image(annotation: Annotation, folder: Path, strip_prefix: str) -> Path | None:
    path = annotation.image_path
    if not path:
        return None
    if not path.startswith(strip_prefix):
        raise DataError(f"{annotation.where}: image_path {path!r:.80} does not begin with {strip_prefix!r}")
    try:
        return image_below(folder, path.removeprefix(strip_prefix).lstrip("/" if strip_prefix else ""))
    except DataError as error:
        raise DataError(f"{annotation.where}: {error}; or name what to strip off the front of every path") from error


def fill_in(task: tasks.Task[Any, Any], annotation: Annotation) -> str:
    """The task's default instruction with its arguments out of an annotation; see ``make_questions``.

    Raises:
        DataError: The annotation lacks one, or the task refuses it.
    """
    values: dict[str, Any] = {}
    for name, parameter in inspect.signature(task.prompt).parameters.items():
        is_required = parameter.default is inspect.Parameter.empty
        if name == "geometry":
            values[name] = annotation.geometry
        elif name == "box":
            values[name] = _box(task, annotation)
        elif name == "choices":
            values[name] = _choices(annotation)
        elif name != "wording" and (is_required or name in annotation.fields):
            value = annotation.fields.get(name, annotation.question)
            if not isinstance(value, str):
                raise DataError(f"{annotation.where}: {name!r} must be text, got {value!r:.80}")
            values[name] = value
    return task.prompt(**values)


def _box(task: tasks.Task[Any, Any], annotation: Annotation) -> Box:
    try:
        return gold_box(dataclasses.replace(annotation, gold=annotation.fields.get("box")))
    except DataError as error:
        raise DataError(f"{error}, as the 'box' that task {task.name!r} asks about") from error


def _choices(annotation: Annotation) -> list[str]:
    choices = annotation.fields.get("choices", [])
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"{annotation.where}: 'choices' must be a list of texts, got {choices!r:.80}")
    return choices


def check_images(questions: Sequence[Question], images: str | Path) -> None:
    """Raise if none of the images exists. Single missing images are reported by the run.

    Raises:
        DataError: There are images to open and none of them exists.
    """
    paths = [question.image for question in questions if question.image is not None]
    if paths and not any(path.exists() for path in paths):
        raise DataError(
            f"{images} holds none of the {len(paths)} images; the first would be {paths[0]}: name the folder that the "
            "annotations' image paths are relative to, or what to strip off their front"
        )


def hash_prompts(questions: Sequence[Question]) -> str:
    """SHA-256 of every prompt in order, each ended by a zero byte."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(question.prompt.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()
