"""Drawing an answer onto its picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sphinxkit.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

    from sphinxkit.formatters.tasks import ParseResult, Task


def picture_format(target: Path, source: Path) -> str:
    """Pillow's name of the format that a drawing is written in, by its ending.

    Raises:
        DataError: No such ending, or the drawing would replace the picture it is drawn on.
    """
    from PIL import Image

    formats = Image.registered_extensions()
    name = formats.get(target.suffix.lower())
    if name is None or name not in Image.SAVE:
        raise DataError(f"--draw {target}: Pillow writes no {target.suffix or 'file without an ending'}; take .png")
    if target.exists() and source.exists() and target.samefile(source):
        raise DataError(f"--draw {target}: this is the picture itself; name another file")
    return name


def read_places(answer: str, picture: Image, task: Task[Any, Any] | None, label: str | None) -> ParseResult[Any]:
    """What an answer says, in pixels of its picture: boxes have their phrase, or ``label`` where they have none.

    Args:
        answer: The model's words.
        picture: That it is about.
        task: Reads the answer; None: whatever looks like a place is one.
        label: What was asked for.
    """
    from sphinxkit.formatters.draw import find_places
    from sphinxkit.formatters.tasks import GroundedPhrase, ParseResult
    from sphinxkit.geometry import Box, ImageGeometry

    geometry = ImageGeometry(*picture.size)
    result = find_places(answer, geometry) if task is None else task.parse(answer, geometry)
    named: list[Any] = []
    for item in result.items:
        if isinstance(item, Box):
            named.append(GroundedPhrase(label or "", (item,)))
        elif isinstance(item, GroundedPhrase) and not item.phrase and label:
            named.append(GroundedPhrase(label, item.boxes, item.start))
        else:
            named.append(item)
    return ParseResult(tuple(named), result.errors, result.text)


def count_places(items: Sequence[Any]) -> str:
    """In words how many boxes and points there are; "" if there is none."""
    from sphinxkit.formatters.tasks import GroundedPhrase, Keypoints
    from sphinxkit.geometry import Point

    boxes = sum(len(item.boxes) for item in items if isinstance(item, GroundedPhrase))
    points = sum(len(item.points) for item in items if isinstance(item, Keypoints))
    points += sum(isinstance(item, Point) for item in items)
    counted = ((boxes, "box", "boxes"), (points, "point", "points"))
    return " and ".join(f"{number} {one if number == 1 else many}" for number, one, many in counted if number)


def write_drawing(target: Path, form: str, picture: Image, items: Sequence[Any]) -> str:
    """Write a copy of the picture with the items on it, whole or not at all.

    Args:
        target: File to write.
        form: See ``picture_format``.
        picture: At its own size.
        items: See ``read_places``; words are not drawn.
    Returns:
        What was drawn, in words.
    Raises:
        DataError: The file cannot be written.
    """
    from sphinxkit.atomic import atomic_file
    from sphinxkit.formatters.draw import draw_items

    canvas = draw_items(picture, [item for item in items if not isinstance(item, str)])
    try:
        with atomic_file(target) as temporary:
            canvas.save(temporary, format=form)
    except (OSError, ValueError) as error:
        raise DataError(f"--draw {target}: cannot be written: {error}") from error
    found = count_places(items)
    return (
        f"{target}: {found} drawn" if found else f"{target}: the answer holds nothing to draw, the picture is as it was"
    )
