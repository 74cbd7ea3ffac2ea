"""One visitor's questions about pictures, and the answers as a page shows them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sphinxkit.errors import DataError
from sphinxkit.formatters import tasks
from sphinxkit.formatters.draw import count_places, draw_items, find_places, label_boxes
from sphinxkit.generation import Sampling
from sphinxkit.geometry import ImageGeometry, read_box
from sphinxkit.sphinx_model.answers import uncertainty
from sphinxkit.tilers import load_image

if TYPE_CHECKING:
    from PIL.Image import Image

    from sphinxkit.sphinx_model import ChatSession, SphinxModel

# Our choices: the largest picture (a camera's photo); a drawing's least side, for sharp lines and letters.
MAX_PICTURE_PIXELS = 25_000_000
MIN_DRAWING = 512

Field = Literal["picture", "words", "choices", "region", "question"]
"""Fields of the form; "question" is the whole of it."""


class FieldError(DataError):
    """What is missing or wrong in a field of the form.

    Args:
        field: The field.
        message: For the visitor.
    """

    def __init__(self, field: Field, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Form:
    """What a visitor asks, as the form has it. A field that the task does not take is ignored.

    Args:
        picture: File of the picture; None is no picture.
        task: Name of a task; None: the words are the question.
        words: Question, phrase or category.
        choices: The answers to choose from, one a line.
        region: ``X1,Y1,X2,Y2`` in pixels; "" is the whole picture.
        keeps_history: Without a task: whether earlier turns about the picture are remembered.
    """

    picture: Path | None = None
    task: str | None = None
    words: str = ""
    choices: str = ""
    region: str = ""
    keeps_history: bool = False


@dataclass(frozen=True)
class Reply:
    """An answer, complete or in progress.

    Args:
        asked: The model's prompt.
        text: The answer, or its beginning.
        drawing: The picture with the answer's boxes and points; None where there are none.
        notes: What was drawn, what could not be parsed, and how sure the model is.
        warning: Said where the model is unsure.
    """

    asked: str
    text: str
    drawing: Image | None = None
    notes: tuple[str, ...] = ()
    warning: str | None = None


@dataclass
class Talk:
    """One visitor's conversation; a new picture starts a new one.

    Args:
        model: The model.
        sampling: How answers are written; its stop strings are the template's.
        num_draft_tokens: See ``SphinxModel.session``.
        picture_note: Gives a note where the model does not know a picture's kind, or None.
    """

    model: SphinxModel
    sampling: Sampling = field(default_factory=Sampling)
    num_draft_tokens: int | None = None
    picture_note: Callable[[Image], str | None] | None = None
    replies: list[Reply] = field(default_factory=list)
    """The complete answers about the picture."""

    _session: ChatSession | None = None
    _source: Path | None = None
    _picture: Image | None = None
    _picture_note: str | None = None

    def ask(self, question: Form) -> Iterator[Reply]:
        """Answer in growing replies; the last one is complete and joins ``replies``.

        Raises:
            FieldError: A field is missing or wrong.
            DataError: The model cannot answer (the conversation is too long, ...).
        """
        session = self._open(question.picture)
        asked = self._word(question)
        if question.task is not None or not question.keeps_history:
            session.reset()
        words = asked if isinstance(asked, str) else asked.text
        text, how = "", self.sampling
        for piece in session.stream(asked, how.max_new_tokens, how.temperature, how.top_p, how.seed):
            text += piece
            yield Reply(words, text.strip())
        reply = self._finish(asked, words, text.strip(), session.confidence)
        self.replies.append(reply)
        yield reply

    def _open(self, source: Path | None) -> ChatSession:
        if self._session is None or source != self._source:
            picture = None if source is None else open_picture(source)
            self._session = self.model.session(picture, num_draft_tokens=self.num_draft_tokens)
            self._source, self._picture = source, picture
            self._picture_note = None if picture is None or self.picture_note is None else self.picture_note(picture)
            self.replies = []
        return self._session

    def _word(self, question: Form) -> str | tasks.TaskQuestion:
        words = question.words.strip()
        if question.task is None:
            if not words:
                raise FieldError("words", "Type a question.")
            return words
        if self._picture is None:
            raise FieldError("picture", "This task is about a picture: choose one, or one of the examples.")
        takes = form_fields(question.task)
        fields: dict[str, Any] = {}
        if takes.words:
            if not words:
                raise FieldError("words", f"This task asks about a {takes.words}: type one.")
            fields[takes.words] = words
        if takes.has_choices:
            fields["choices"] = [line.strip() for line in question.choices.splitlines() if line.strip()]
            if len(fields["choices"]) < 2:
                raise FieldError("choices", "Give two choices or more, one a line.")
        geometry = ImageGeometry(*self._picture.size)
        if not (takes.has_region and question.region.strip()):
            return tasks.make_question(question.task, geometry, **fields)
        try:
            return tasks.make_question(question.task, geometry, box=read_box(question.region), **fields)
        except DataError as error:
            raise FieldError("region", str(error)) from error

    def _finish(self, asked: str | tasks.TaskQuestion, words: str, text: str, confidence: float | None) -> Reply:
        told = [] if confidence is None else [f"confidence {confidence:.2f} ({math.exp(confidence):.0%} a token)"]
        doubts = (self._picture_note, uncertainty(self.model.conversation, confidence))
        warning = "; ".join(filter(None, doubts)) or None
        if self._picture is None:
            return Reply(words, text, None, tuple(told), warning)
        canvas = enlarge(self._picture)
        geometry = ImageGeometry(*canvas.size)
        found = find_places(text, geometry) if isinstance(asked, str) else asked.task.parse(text, geometry)
        items = label_boxes(found.items, "" if isinstance(asked, str) else asked.label)
        unread = [f"not read: {error.text!r} ({tasks.ERROR_KINDS[error.kind]})" for error in found.failures]
        count = count_places(items)
        drawing = draw_items(canvas, [item for item in items if not isinstance(item, str)]) if count else None
        return Reply(words, text, drawing, (*([f"{count} drawn"] if count else []), *unread, *told), warning)


@dataclass(frozen=True)
class FormFields:
    """The fields of the form that a task takes.

    Args:
        words: Name of its text (question, phrase, category); "" if it takes none.
        has_choices: Whether it chooses among answers.
        has_region: Whether it asks about a region.
    """

    words: str
    has_choices: bool
    has_region: bool


def form_fields(task: str | None) -> FormFields:
    """The fields that a task takes.

    Args:
        task: Name of a task; None: own words.
    """
    if task is None:
        return FormFields("question", has_choices=False, has_region=False)
    found = tasks.create(task)
    takes = tasks.question_fields(found)
    return FormFields("".join(tasks.text_fields(found)[:1]), "choices" in takes, "box" in takes)


def open_picture(source: Path) -> Image:
    """A visitor's picture.

    Args:
        source: The uploaded file.
    Raises:
        FieldError: It is gone, no picture, damaged, or too large.
    """
    if not source.exists():
        raise FieldError("picture", "This picture was deleted, as all are in time: choose it again.")
    try:
        return load_image(source, max_pixels=MAX_PICTURE_PIXELS)
    except DataError as error:
        reason = str(error).replace(str(source), source.name).partition(";")[0]  # advice for who runs the server goes
        raise FieldError("picture", f"{reason}.") from error


def enlarge(picture: Image) -> Image:
    """A small picture with every pixel repeated, so that its longer side is ``MIN_DRAWING`` or more."""
    times = math.ceil(MIN_DRAWING / max(picture.size))
    return picture if times == 1 else picture.resize((picture.width * times, picture.height * times), 0)


def add_corner(region: str, x: float, y: float) -> str:
    """The region after a click: the first sets a corner, the second the opposite one, the third begins anew.

    Args:
        region: ``X,Y`` or ``X1,Y1,X2,Y2``, in pixels, or nothing.
        x: x of the click, in pixels of the image.
        y: y of the click.
    """
    try:
        given = [float(word) for word in region.split(",")]
    except ValueError:
        given = []
    if len(given) != 2:
        return f"{x:g},{y:g}"
    return ",".join(f"{side:g}" for side in (*map(min, given, (x, y)), *map(max, given, (x, y))))
