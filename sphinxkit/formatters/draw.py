"""Finds boxes, phrases and key points in any task's answer, and draws them.

Coordinates are original pixels, as the parsers give them. Line and font sizes scale with the image.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from sphinxkit.atomic import atomic_file
from sphinxkit.errors import DataError
from sphinxkit.formatters.tasks.base import ErrorLog, GroundedPhrase, Keypoints, ParseResult
from sphinxkit.formatters.tasks.coordinates import read_boxes, read_points
from sphinxkit.formatters.tasks.grounding import Scanner
from sphinxkit.formatters.tasks.pose import COCO_KEYPOINTS
from sphinxkit.geometry import Box, ImageGeometry, Point

# Okabe and Ito's colours without black: told apart by colour-blind readers as well. Source: Okabe and Ito, "Color
# Universal Design", 2008.
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")

COCO_SKELETON = (
    *(("left_ankle", "left_knee"), ("left_knee", "left_hip"), ("right_ankle", "right_knee")),
    *(("right_knee", "right_hip"), ("left_hip", "right_hip"), ("left_shoulder", "left_hip")),
    *(("right_shoulder", "right_hip"), ("left_shoulder", "right_shoulder"), ("left_shoulder", "left_elbow")),
    *(("right_shoulder", "right_elbow"), ("left_elbow", "left_wrist"), ("right_elbow", "right_wrist")),
    *(("left_eye", "right_eye"), ("nose", "left_eye"), ("nose", "right_eye"), ("left_eye", "left_ear")),
    *(("right_eye", "right_ear"), ("left_ear", "left_shoulder"), ("right_ear", "right_shoulder")),
)
"""Which of COCO's key points are joined. Source: COCO 2017, person_keypoints_*.json, categories[0].skeleton."""

LINE_FRACTION = 1 / 250  # of the image's mean side (our choice)
TEXT_FRACTION = 1 / 28  # of the same side (our choice)
MAX_LABEL = 40  # characters of a label that are drawn (our choice)
NEAREST_PERCENT = 1  # of the picture's pixels may be nearer to a colour than its distance says (our choice)
MIN_LUMA_OF_BLACK = 100  # of 255: beside darker colours stands white (our choice)


def find_places(answer: str, geometry: ImageGeometry) -> ParseResult[GroundedPhrase | Keypoints | Point]:
    """Find every box and point of an answer, for any task.

    Lists of four numbers are boxes, with the phrase in front of them if there is one; pairs are points. Points named
    as COCO's key points make a body, and a name that comes again begins the next body. A task's own ``parse`` can
    repair more, because it knows what to expect.

    Args:
        answer: The model's answer.
        geometry: The image's size.
    Returns:
        Boxes and points in original pixels, inside the image, in the answer's order; the errors are those of reading
        coordinates and markup.
    """
    log = ErrorLog(answer)
    items: list[GroundedPhrase | Keypoints | Point] = []
    body: dict[str, Point] = {}
    for group in Scanner(log, running_text=True).groups():
        phrase = group.phrase or ""
        name = "_".join(phrase.lower().replace("-", " ").split())
        boxes: list[Box] = []
        for start, end in group.lists:
            if answer[start:end].partition(";")[0].count(",") != 1:
                boxes += read_boxes(log, start, end, geometry)
                continue
            for point in read_points(log, start, end, geometry):
                if name not in COCO_KEYPOINTS:
                    items.append(point)
                    continue
                if not body or name in body:
                    body = {}
                    items.append(Keypoints(body))
                body[name] = point
        if boxes:
            items.append(GroundedPhrase(phrase, tuple(boxes)))
    return ParseResult(tuple(items), tuple(log.errors))


def rank_palette(image: Image.Image) -> tuple[str, ...]:
    """``PALETTE``, ordered by how far a colour is from the picture's own; the farthest first.

    Args:
        image: Any mode.
    """
    small = image.convert("RGB").resize((64, 64), Image.Resampling.NEAREST)
    pixels = np.asarray(small, dtype=np.float32).reshape(-1, 1, 3)
    colours = np.array([ImageColor.getrgb(colour) for colour in PALETTE], dtype=np.float32)
    distances = np.percentile(np.linalg.norm(pixels - colours, axis=-1), NEAREST_PERCENT, axis=0)
    return tuple(PALETTE[i] for i in np.argsort(-distances, kind="stable"))


def _scaled(image: Image.Image, fraction: float, least: int) -> int:
    return max(least, round((image.width + image.height) / 2 * fraction))


def _contrast(colour: str) -> str:
    """Colour of letters on a colour, and of the thin line beside a line, which is then seen on any picture."""
    [luma] = Image.new("RGB", (1, 1), colour).convert("L").tobytes()
    return "white" if luma < MIN_LUMA_OF_BLACK else "black"


def _edge(width: int) -> int:
    """Width of the thin line beside a line."""
    return max(1, width // 2)


def _label(draw: ImageDraw.ImageDraw, image: Image.Image, text: str, at: Point, colour: str) -> None:
    if not text:
        return
    text = " ".join(text.split())
    text = text if len(text) <= MAX_LABEL else f"{text[: MAX_LABEL - 1]}…"
    font = ImageFont.load_default(size=_scaled(image, TEXT_FRACTION, 10))
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    pad = _scaled(image, LINE_FRACTION, 1)
    width, height = right - left + 2 * pad, bottom - top + 2 * pad
    x = min(max(at.x, 0), max(image.width - width, 0))
    y = at.y - height if at.y >= height else at.y
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    draw.text((x + pad - left, y + pad - top), text, fill=_contrast(colour), font=font)


def draw_boxes(
    image: Image.Image, boxes: Sequence[Box], labels: Sequence[str] | None = None, colours: Sequence[str] | None = None
) -> Image.Image:
    """A copy of the image with boxes on it, each with a thin black or white line inside its own.

    Args:
        image: Any mode; the copy is RGB.
        boxes: In original pixels.
        labels: One for each box, "" for none.
        colours: One for each box, as PIL names them; else each box has the next of ``rank_palette``.
    Raises:
        DataError: The number of labels or colours differs from the number of boxes.
    """
    for what, given in (("labels", labels), ("colours", colours)):
        if given is not None and len(given) != len(boxes):
            raise DataError(f"draw: {len(given)} {what} for {len(boxes)} boxes")
    canvas = image.convert("RGB").copy()
    draw = ImageDraw.Draw(canvas)
    width = _scaled(canvas, LINE_FRACTION, 1)
    if colours is None:
        ranked = rank_palette(image)
        colours = [ranked[i % len(ranked)] for i in range(len(boxes))]
    for box, colour in zip(boxes, colours, strict=True):
        x1, y1, x2, y2 = (round(side) for side in (box.x1, box.y1, box.x2, box.y2))  # PIL would cut the decimals off
        for line, wide in ((_contrast(colour), width + _edge(width)), (colour, width)):
            draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=line, width=wide)
    for box, colour, label in zip(boxes, colours, labels or [""] * len(boxes), strict=True):
        _label(draw, canvas, label, Point(box.x1, box.y1), colour)
    return canvas


def draw_keypoints(image: Image.Image, keypoints: Keypoints, colour: str | None = None) -> Image.Image:
    """A copy of the image with a body's key points and the bones between them (``COCO_SKELETON``).

    Args:
        image: Any mode; the copy is RGB.
        keypoints: In original pixels; bones with an absent end are left out.
        colour: Of the bones; None: the first of ``rank_palette``.
    """
    canvas = image.convert("RGB").copy()
    draw = ImageDraw.Draw(canvas)
    width = _scaled(canvas, LINE_FRACTION, 1)
    points = keypoints.points
    bones = [(points[start], points[end]) for start, end in COCO_SKELETON if start in points and end in points]
    colour = colour or rank_palette(image)[0]
    for fill, wide in ((_contrast(colour), width + 2 * _edge(width)), (colour, width)):
        for start, end in bones:
            draw.line((start.x, start.y, end.x, end.y), fill=fill, width=wide)
    for point in points.values():
        _dot(draw, point, 1.5 * width, colour)
    return canvas


def _dot(draw: ImageDraw.ImageDraw, point: Point, radius: float, colour: str) -> None:
    corners = (point.x - radius, point.y - radius, point.x + radius, point.y + radius)
    draw.ellipse(corners, fill=colour, outline=_contrast(colour))


def draw_items(image: Image.Image, items: Iterable[Any]) -> Image.Image:
    """A copy of the image with everything that a parser found in an answer.

    Boxes are drawn in one colour for each phrase, labelled with it; points as dots; words in the bottom left corner.

    Args:
        image: Any mode; the copy is RGB.
        items: ``ParseResult.items`` of any task.
    Raises:
        DataError: An item is of no known kind.
    """
    canvas = image.convert("RGB").copy()
    ranked = rank_palette(canvas)
    boxes: list[tuple[Box, str]] = []
    words: list[str] = []
    for item in items:
        match item:
            case Box():
                boxes.append((item, ""))
            case GroundedPhrase():
                boxes += [(box, item.phrase) for box in item.boxes]
            case Keypoints():
                canvas = draw_keypoints(canvas, item, ranked[0])
            case Point():
                _dot(ImageDraw.Draw(canvas), item, 1.5 * _scaled(canvas, LINE_FRACTION, 1), ranked[0])
            case str():
                words.append(item)
            case _:
                raise DataError(f"draw: cannot draw a {type(item).__name__}")
    names = list(dict.fromkeys(label for _, label in boxes))
    colours = [ranked[names.index(label) % len(ranked)] for _, label in boxes]
    canvas = draw_boxes(canvas, [box for box, _ in boxes], [label for _, label in boxes], colours)
    if words:
        _label(ImageDraw.Draw(canvas), canvas, " / ".join(words), Point(0, canvas.height), PALETTE[3])
    return canvas


def label_boxes(items: Iterable[Any], label: str) -> tuple[Any, ...]:
    """Items in which boxes without a phrase have one.

    Args:
        items: ``ParseResult.items`` of any task.
        label: The requested phrase; "" keeps boxes without a phrase.
    """
    named: list[Any] = []
    for item in items:
        if isinstance(item, Box):
            named.append(GroundedPhrase(label, (item,)))
        elif isinstance(item, GroundedPhrase) and not item.phrase and label:
            named.append(GroundedPhrase(label, item.boxes, item.start))
        else:
            named.append(item)
    return tuple(named)


def count_places(items: Iterable[Any]) -> str:
    """Describe the number of boxes and points; "" if there are none."""
    boxes = points = 0
    for item in items:
        match item:
            case Box():
                boxes += 1
            case GroundedPhrase():
                boxes += len(item.boxes)
            case Keypoints():
                points += len(item.points)
            case Point():
                points += 1
    counted = ((boxes, "box", "boxes"), (points, "point", "points"))
    return " and ".join(f"{number} {one if number == 1 else many}" for number, one, many in counted if number)


def check_target(target: Path, source: Path | None = None) -> str:
    """Pillow's format name for a file's suffix.

    Args:
        target: File that a drawing is to be written to.
        source: The picture that is drawn on.
    Raises:
        DataError: No such ending, or the drawing would replace the picture it is drawn on.
    """
    name = Image.registered_extensions().get(target.suffix.lower())
    if name is None or name not in Image.SAVE:
        raise DataError(f"draw {target}: Pillow writes no {target.suffix or 'file without an ending'}; take .png")
    if source is not None and target.exists() and source.exists() and target.samefile(source):
        raise DataError(f"draw {target}: this is the picture itself; name another file")
    return name


def save_drawing(target: str | Path, image: Image.Image, items: Iterable[Any]) -> None:
    """Write a copy of an image with an answer's boxes and points, atomically.

    Args:
        target: File to write; its ending says the format.
        image: At its own size.
        items: ``ParseResult.items`` of any task; words are not drawn.
    Raises:
        DataError: The ending is unknown, or the file cannot be written.
    """
    target = Path(target)
    form = check_target(target)
    canvas = draw_items(image, [item for item in items if not isinstance(item, str)])
    try:
        with atomic_file(target) as temporary:
            canvas.save(temporary, format=form)
    except (OSError, ValueError) as error:
        raise DataError(f"draw {target}: cannot be written: {error}") from error
