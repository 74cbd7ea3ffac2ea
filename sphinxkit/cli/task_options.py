"""Builds a task's question from --task, --prompt and --box."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import typer

from sphinxkit.errors import DataError

if TYPE_CHECKING:
    from sphinxkit.formatters.tasks import Task, TaskQuestion
    from sphinxkit.geometry import ImageGeometry


def read_task(task: str | Task[Any, Any], prompt: str | None, box: str | None, geometry: ImageGeometry) -> TaskQuestion:
    """The question that the options ask.

    Args:
        task: A task of ``formatters.tasks``, or its name.
        prompt: The task's argument: a phrase (rec), a category (detection), a question (vqa).
        box: Of a task that asks about a region (pose, reg), as ``geometry.read_box`` reads it; None is the whole
            picture, and is said on stderr.
        geometry: The picture's size.
    Raises:
        RegistryError: There is no such task.
        DataError: Words or a box are missing, are not what the task asks about, or the task refuses them.
    """
    from sphinxkit.formatters import tasks
    from sphinxkit.geometry import read_box

    found = tasks.create(task) if isinstance(task, str) else task
    words = tasks.text_fields(found)
    fields: dict[str, Any] = {}
    if len(words) > 1:
        raise DataError(
            f"task {found.name!r}: it takes more than one text ({', '.join(words)}); write the question out"
        )
    if words and prompt is None:
        raise DataError(f"task {found.name!r}: it asks about a {words[0]}; give one (--prompt)")
    if prompt is not None:
        if not words:
            raise DataError(f"task {found.name!r}: it takes no words (--prompt)")
        fields[words[0]] = prompt
    has_box = "box" in inspect.signature(found.prompt).parameters
    if box is not None:
        if not has_box:
            raise DataError(f"task {found.name!r}: it takes no region (--box)")
        try:
            fields["box"] = read_box(box)
        except DataError as error:
            raise DataError(f"--box: {error}") from error
    elif has_box:
        typer.echo("no --box: the whole picture", err=True)
    return tasks.make_question(found, geometry, **fields)
