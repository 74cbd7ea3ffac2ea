"""A task's own wording out of what is given on the command line."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import typer

from sphinxkit.errors import DataError

if TYPE_CHECKING:
    from sphinxkit.formatters.tasks import Task
    from sphinxkit.geometry import Box, ImageGeometry


def parse_box(text: str) -> Box:
    """``X1,Y1,X2,Y2`` in the picture's pixels.

    Raises:
        DataError: Not four numbers, or swapped corners.
    """
    from sphinxkit.geometry import Box

    try:
        x1, y1, x2, y2 = (float(word) for word in text.split(","))
    except ValueError as error:
        raise DataError(f"region {text!r} (--box): expected X1,Y1,X2,Y2 in pixels") from error
    try:
        return Box(x1, y1, x2, y2)
    except DataError as error:
        raise DataError(f"region {text!r} (--box): {error}") from error


def task_instruction(task: Task[Any, Any], prompt: str | None, box: str | None, geometry: ImageGeometry) -> str:
    """What to ask for a task, in the wording that SPHINX learns for it.

    Args:
        task: Of ``sphinxkit.formatters.tasks``.
        prompt: The task's words: a phrase (rec), a category (detection), a question (vqa).
        box: Of a task that asks about a region (pose, reg), as ``parse_box`` reads it; None is the whole picture, and
            is said on stderr.
        geometry: The picture's size.
    Raises:
        DataError: Words or a box are missing, are not what the task asks about, or the task refuses them.
    """
    from sphinxkit.geometry import Box

    parameters = inspect.signature(task.prompt).parameters
    words = [name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty]
    words = [name for name in words if name not in ("box", "geometry")]
    values: dict[str, Any] = {"geometry": geometry} if "geometry" in parameters else {}
    if len(words) > 1:
        raise DataError(f"task {task.name!r}: it takes more than one text ({', '.join(words)}); write the question out")
    if words and prompt is None:
        raise DataError(f"task {task.name!r}: it asks about a {words[0]}; give one (--prompt)")
    if prompt is not None:
        if not words:
            raise DataError(f"task {task.name!r}: it takes no words (--prompt)")
        values[words[0]] = prompt
    if box is not None and "box" not in parameters:
        raise DataError(f"task {task.name!r}: it takes no region (--box)")
    if "box" in parameters:
        if box is None:
            typer.echo("no --box: the whole picture", err=True)
        whole = Box(0.0, 0.0, float(geometry.width), float(geometry.height))
        values["box"] = whole if box is None else parse_box(box)
    return task.prompt(**values)
