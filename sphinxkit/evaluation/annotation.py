"""One question with its gold answer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from sphinxkit.data.json_stream import is_finite_number
from sphinxkit.errors import DataError
from sphinxkit.formatters.tasks.base import GroundedPhrase, ParseResult
from sphinxkit.geometry import ImageGeometry

_SIZE = re.compile(r"height(\d+)_?width(\d+)|width(\d+)_?height(\d+)")


@dataclass(frozen=True, slots=True)
class Annotation:
    """One question with its gold answer.

    Args:
        question_id: The benchmark's id; not always unique.
        image_path: The image's path in the file.
        question: The question in the file.
        gold: ``gt_answers``: a string, a list of strings, a box, or what the task's metric takes.
        where: "file:line", for messages.
        size: (width, height) of the image in pixels where the file tells, by ``width`` and ``height`` or within
            ``question_id`` ("height480_width640").
        fields: The whole record.
        split: The record's split, in a file that holds several; "" elsewhere.
    """

    question_id: str | int
    image_path: str
    question: str
    gold: Any
    where: str
    size: tuple[int, int] | None
    fields: dict[str, Any]
    split: str = ""

    @property
    def geometry(self) -> ImageGeometry:
        """The image's geometry.

        Raises:
            DataError: The record does not tell the size, or one that no image has.
        """
        if self.size is None:
            raise DataError(
                f"{self.where}: the image size is needed: 'width' and 'height', or a question_id such as "
                "height480_width640"
            )
        if not all(is_finite_number(side) and side > 0 for side in self.size):
            raise DataError(f"{self.where}: width and height must be positive, got {self.size!r:.80}")
        return ImageGeometry(*self.size)


@dataclass(frozen=True, slots=True)
class Record:
    """One annotation with the answer to be scored.

    Args:
        annotation: The question.
        prediction: The answer.
        boxes: What the answer says, where it is in another model's format; None: the task's parser reads it.
    """

    annotation: Annotation
    prediction: str
    boxes: ParseResult[GroundedPhrase] | None = None


def image_size(record: dict[str, Any]) -> tuple[int, int] | None:
    """(width, height) of a record's image where it tells; see ``Annotation``."""
    width, height = record.get("width"), record.get("height")
    if isinstance(width, int) and isinstance(height, int):
        return width, height
    found = _SIZE.search(str(record.get("question_id", "")))
    if not found:
        return None
    height_first, width_second, width_first, height_second = found.groups()
    return int(width_second or width_first), int(height_first or height_second)
