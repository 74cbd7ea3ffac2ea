"""A task's question about one image, with its parser."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from sphinxkit.errors import DataError
from sphinxkit.formatters.tasks.base import ParseResult, Task, create
from sphinxkit.geometry import Box, ImageGeometry


@dataclass(frozen=True, slots=True)
class TaskQuestion:
    """A task's question about one image.

    Args:
        task: The task.
        text: The instruction, in the task's wording.
        geometry: Image size.
        label: The phrase or category in the question; "" if the task takes none.
    """

    task: Task[Any, Any]
    text: str
    geometry: ImageGeometry
    label: str = ""

    def parse(self, answer: str) -> ParseResult[Any]:
        """Parse an answer, in pixels of the image; see ``Task.parse``."""
        return self.task.parse(answer, self.geometry)


def text_fields(task: Task[Any, Any]) -> tuple[str, ...]:
    """The texts that a task's question needs: ``("phrase",)`` for rec, ``()`` for pose."""
    parameters = inspect.signature(task.prompt).parameters
    required = (name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty)
    return tuple(name for name in required if name not in ("box", "geometry"))


def question_fields(task: Task[Any, Any]) -> tuple[str, ...]:
    """Everything that a task's question takes: ``("box", "wording")`` for pose."""
    return tuple(name for name in inspect.signature(task.prompt).parameters if name != "geometry")


def make_question(task: str | Task[Any, Any], geometry: ImageGeometry, **fields: Any) -> TaskQuestion:
    """Word a task's question about an image.

    Args:
        task: A task, or the name of one.
        geometry: Size of the image.
        fields: What the task's ``prompt`` takes: ``phrase="the red circle"`` (rec), ``category="dog"`` (detection),
            ``question="How many?"`` (vqa), ``box=Box(...)`` in pixels (pose, reg; without it the whole image).
    Raises:
        RegistryError: There is no such task.
        DataError: A field is missing, unknown, or one that the task refuses.
    """
    found = create(task) if isinstance(task, str) else task
    known = question_fields(found)
    unknown = [name for name in fields if name not in known]
    if unknown:
        takes = f"takes {', '.join(known)}" if known else "takes nothing"
        raise DataError(f"task {found.name!r}: there is no field {unknown[0]!r}; it {takes}")
    required = text_fields(found)
    missing = [name for name in required if not isinstance(fields.get(name), str)]
    if missing:
        raise DataError(f"task {found.name!r}: it asks about a {missing[0]}; give {missing[0]}= a text")
    values = dict(fields)
    if "geometry" in inspect.signature(found.prompt).parameters:
        values["geometry"] = geometry
    if "box" in known and values.get("box") is None:
        values["box"] = Box(0.0, 0.0, float(geometry.width), float(geometry.height))
    label = fields[required[0]] if required else ""
    return TaskQuestion(found, found.prompt(**values), geometry, label)
