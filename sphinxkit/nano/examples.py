"""Pictures of the drawn world, each with a question that SPHINX-nano answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["ABOUT", "DrawnExample", "examples"]

ABOUT = (
    "It knows one drawn world: shapes in eight colors, short made-up words, stick figures, pages and bar charts. It "
    "has never seen a photograph; its answers about one are guesses."
)
"""What SPHINX-nano knows."""

SIZE = (448, 336)  # as large as pictures that people have; our choice
# Task and number of a scene of the validation split: nothing of it was seen in training. Our choice, one a task.
_SCENES = (
    ("vqa", 1),
    ("rec", 6),
    ("detection", 3),
    ("grounded_caption", 7),
    ("text_detection", 3),
    ("pose", 2),
    ("layout", 5),
    ("chart", 1),
)


class DrawnExample(NamedTuple):
    """A question about a drawn picture: ``model.ask(task, picture, **fields)``.

    Args:
        task: A task of ``formatters.tasks``.
        picture: The picture.
        fields: What the task's question takes.
    """

    task: str
    picture: NDArray[np.uint8]
    fields: Mapping[str, Any]


def examples() -> list[DrawnExample]:
    """Draw the examples; always the same ones.

    Shape:
        picture of each: (336, 448, 3) uint8, red, green, blue
    """
    from sphinxkit.formatters import tasks
    from sphinxkit.nano.world.world import World

    world = World("synthetic", "val", size=SIZE)
    found = []
    for task, index in _SCENES:
        sample = world.samples(index, task)[0]
        takes = tasks.question_fields(tasks.create(task))
        fields = {name: getattr(sample, name) for name in takes if name != "wording"}
        found.append(DrawnExample(task, world.scene(index, task).image, fields))
    return found
