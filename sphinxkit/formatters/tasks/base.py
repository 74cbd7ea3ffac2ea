"""Base classes of tasks: examples, parse results, and the task itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from sphinxkit.errors import DataError
from sphinxkit.geometry import Box, ImageGeometry, Point
from sphinxkit.registry import Registry

SampleT = TypeVar("SampleT")
ItemT = TypeVar("ItemT")

MAX_ERRORS = 1000
"""A parser stops reading an answer after this many errors and says so (our choice: bounds time and memory)."""

MAX_QUOTE = 80
"""Characters of the answer that an error quotes at most (our choice)."""


@dataclass(frozen=True, slots=True)
class Example:
    """One question and its answer, as text.

    Args:
        instruction: The user's message.
        answer: The assistant's message.
    """

    instruction: str
    answer: str


class ParseError(NamedTuple):
    """One error that a parser found in an answer.

    Args:
        kind: A short name such as "swapped_corners"; see ``ERROR_KINDS``.
        position: Where it begins in the answer, in characters.
        text: The answer's words at that place, at most ``MAX_QUOTE`` characters.
        is_repaired: True: repaired to an item. False: no item.
    """

    kind: str
    position: int
    text: str
    is_repaired: bool


ERROR_KINDS: Mapping[str, str] = {
    "clipped": "a box or point reaches out of the image and was clipped into it",
    "clipped_value": "a coordinate just outside [0, 1] was moved to the edge",
    "doubled_bracket": "more than one opening bracket",
    "duplicate": "a name occurs again; the first one counts",
    "empty": "there is no answer",
    "extra_text": "words where none belong",
    "gave_up": "too many errors; the rest was not read",
    "missing_close_bracket": "a list of numbers is not closed",
    "missing_close_tag": "a phrase is not closed",
    "missing_open_bracket": "a list of numbers is not opened",
    "missing_open_tag": "a phrase is not opened",
    "missing_phrase": "a list of numbers without a phrase",
    "no_coordinates": "no list of numbers where one is due",
    "not_a_number": "something in a list is not a number",
    "outside_image": "a box or point lies outside the image",
    "out_of_range": "a coordinate is far outside [0, 1]",
    "separator": "commas, semicolons or spaces in the wrong place",
    "spaces": "spaces where none belong",
    "swapped_corners": "a box's corners in the wrong order",
    "tag_spelling": "a tag is not written <p> or </p>",
    "unknown_name": "a name that the task does not have",
    "wording": "the answer is worded in another way",
    "wrong_count": "a wrong number of coordinates or of parts",
}
"""Every kind of error and what it says."""


class ErrorLog:
    """Collects the errors of one answer.

    Args:
        text: The answer.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.errors: list[ParseError] = []
        self.is_full = False
        """Whether ``MAX_ERRORS`` have been recorded: the parser has to stop, further errors are dropped."""

    def add(self, kind: str, start: int, end: int, is_repaired: bool) -> None:
        """Record an error in ``text[start:end]``; the one after the last is recorded as "gave_up"."""
        if self.is_full:
            return
        quote = self.text[start : min(end, start + MAX_QUOTE)]
        if len(self.errors) >= MAX_ERRORS:
            self.is_full = True
            kind, is_repaired = "gave_up", False
        self.errors.append(ParseError(kind, start, quote, is_repaired))

    def add_empty(self) -> None:
        """Record that nothing was found, unless a failure tells why."""
        if all(error.is_repaired for error in self.errors):
            self.add("empty", 0, len(self.text), is_repaired=False)


@dataclass(frozen=True, slots=True)
class ParseResult(Generic[ItemT]):
    """Result of parsing an answer.

    Args:
        items: Parsed items, in the answer's order; coordinates in original pixels, inside the image.
        errors: Every repair and every failure, in the order in which they were found; none for a perfect answer.
        text: The answer's words without markup and coordinates.
    """

    items: tuple[ItemT, ...]
    errors: tuple[ParseError, ...] = ()
    text: str = ""

    @property
    def is_strict(self) -> bool:
        """Whether the answer needed no repair and lost nothing."""
        return not self.errors

    @property
    def failures(self) -> tuple[ParseError, ...]:
        """The errors that nothing could be made of."""
        return tuple(error for error in self.errors if not error.is_repaired)


@dataclass(frozen=True, slots=True)
class GroundedPhrase:
    """A phrase and its boxes.

    Args:
        phrase: The phrase; "" for boxes without a phrase.
        boxes: In original pixels.
        start: Start of the phrase in the answer's plain text; None if the task has no running text.
    """

    phrase: str
    boxes: tuple[Box, ...]
    start: int | None = None


def labelled_boxes(items: Iterable[Any]) -> list[tuple[str, Box]]:
    """Every box among parsed items with its phrase; "" for boxes without one.

    Args:
        items: Of a ``ParseResult``. Words, points and key points have no box and are left out.
    """
    found: list[tuple[str, Box]] = []
    for item in items:
        if isinstance(item, GroundedPhrase):
            found += [(item.phrase, box) for box in item.boxes]
        elif isinstance(item, Box):
            found.append(("", item))
    return found


@dataclass(frozen=True, slots=True)
class Keypoints:
    """Visible key points of one person.

    Args:
        points: Name to point, in original pixels.
    """

    points: Mapping[str, Point] = field(default_factory=dict)


class Task(ABC, Generic[SampleT, ItemT]):
    """One vision-language task: words its questions and answers, and parses answers.

    ``prompt`` returns only the instruction; its arguments depend on the task.
    """

    name: ClassVar[str]
    """Registered name."""
    metric: ClassVar[str]
    """Name of the metric that scores it, in ``sphinxkit.evaluation.metrics.registry``."""
    wordings: ClassVar[tuple[str, ...]]
    """The instruction in several wordings, the default first; names in braces are filled in."""
    answer_start: str = ""
    """Words put in front of the model's answer (``ConversationTemplate.prompt(..., answer_start=...)``)."""

    @abstractmethod
    def format(self, sample: SampleT, wording: int = 0) -> Example:
        """The sample as question and answer.

        Raises:
            DataError: The sample cannot be written down (empty text, a box outside the image, ...).
        """

    @abstractmethod
    def parse(self, text: str, geometry: ImageGeometry) -> ParseResult[ItemT]:
        """Read an answer, in time linear in its length. Nothing is raised for any text: errors are in the result."""

    @abstractmethod
    def items(self, sample: SampleT) -> tuple[ItemT, ...]:
        """Expected items of the sample, with unrounded coordinates."""

    @abstractmethod
    def prompt(self, *args: Any, **kwargs: Any) -> str:
        """The instruction for inference."""

    def instruction(self, wording: int, **fields: str) -> str:
        """Fill in the fields of a wording.

        Raises:
            DataError: There is no such wording, or a field is empty.
        """
        if not 0 <= wording < len(self.wordings):
            raise DataError(f"task {self.name!r}: wording {wording} does not exist, there are {len(self.wordings)}")
        return self.wordings[wording].format(**{key: require(self.name, key, text) for key, text in fields.items()})


class FixedTask(Task[SampleT, ItemT]):
    """A task whose instruction has no fields."""

    def prompt(self, wording: int = 0) -> str:
        """The instruction.

        Raises:
            DataError: There is no such wording.
        """
        return self.instruction(wording)


def require(task: str, what: str, text: str) -> str:
    """``text`` without the white space around it.

    Raises:
        DataError: Nothing is left.
    """
    stripped = text.strip()
    if not stripped:
        raise DataError(f"task {task!r}: the {what} is empty")
    return stripped


registry: Registry[Task[Any, Any]] = Registry("task")
register = registry.register
create = registry.build
names = registry.names
