"""Detection of all objects of a category, and of text."""

from __future__ import annotations

from dataclasses import dataclass

from sphinxkit.errors import DataError
from sphinxkit.formatters.tasks.base import (
    ErrorLog,
    Example,
    FixedTask,
    GroundedPhrase,
    ParseResult,
    Task,
    register,
    require,
)
from sphinxkit.formatters.tasks.grounding import read_grounded, write_grounded
from sphinxkit.geometry import Box, ImageGeometry


@dataclass(frozen=True, slots=True)
class DetectionSample:
    """All objects of a category.

    Args:
        category: Name of the category.
        boxes: In original pixels; none where the image shows none.
        geometry: The image's size.
    """

    category: str
    boxes: tuple[Box, ...]
    geometry: ImageGeometry


@register("detection")
class Detection(Task[DetectionSample, GroundedPhrase]):
    """Object detection, one category at a time: COCO, Objects365. No object is ``<p>category</p>[]`` (our choice).

    Source: the SPHINX authors' published prompts (default wording); the other wording is our choice.
    """

    name = "detection"
    metric = "detection_f1"
    wordings = (
        "Detect all {category} shown in the image.",
        "Give the bounding box of every {category} in the image.",
    )

    def prompt(self, category: str, wording: int = 0) -> str:
        """The instruction.

        Raises:
            DataError: The category is empty, or there is no such wording.
        """
        return self.instruction(wording, category=category)

    def format(self, sample: DetectionSample, wording: int = 0) -> Example:
        """The sample as question and answer.

        Raises:
            DataError: The category is empty, a box is not inside the image, or there is no such wording.
        """
        instruction = self.prompt(sample.category, wording)
        return Example(instruction, write_grounded(self.name, self.items(sample)[0], sample.geometry))

    def parse(self, text: str, geometry: ImageGeometry) -> ParseResult[GroundedPhrase]:
        """The category, "" if the answer does not name it, with its boxes in original pixels."""
        log = ErrorLog(text)
        result = read_grounded(log, geometry, allow_none=True)
        if not result.items:
            log.add_empty()
        return ParseResult(result.items, tuple(log.errors), result.text)

    def items(self, sample: DetectionSample) -> tuple[GroundedPhrase, ...]:
        """The category with its boxes.

        Raises:
            DataError: The category is empty.
        """
        return (GroundedPhrase(require(self.name, "category", sample.category), sample.boxes),)


@dataclass(frozen=True, slots=True)
class TextDetectionSample:
    """All text in an image.

    Args:
        texts: Each with the words and at least one box, in original pixels.
        geometry: The image's size.
    """

    texts: tuple[GroundedPhrase, ...]
    geometry: ImageGeometry


@register("text_detection")
class TextDetection(FixedTask[TextDetectionSample, GroundedPhrase]):
    """Text detection and reading.

    Source: the SPHINX authors' published prompts (default wording); the other wording is our choice.
    """

    name = "text_detection"
    metric = "text_detection_f1"
    wordings = (
        "Please detect all texts and provide their bounding box coordinate.",
        "Read all text in the image and give the bounding box of each piece.",
    )

    def format(self, sample: TextDetectionSample, wording: int = 0) -> Example:
        """The sample as question and answer.

        Raises:
            DataError: There is no text, one is empty or has no box inside the image, or there is no such wording.
        """
        if not sample.texts:
            raise DataError(f"task {self.name!r}: there is no text")
        for text in sample.texts:
            if not text.boxes:
                raise DataError(f"task {self.name!r}: {text.phrase!r} has no box")
        written = [write_grounded(self.name, text, sample.geometry) for text in sample.texts]
        return Example(self.prompt(wording), " ".join(written))

    def parse(self, text: str, geometry: ImageGeometry) -> ParseResult[GroundedPhrase]:
        """Every text with its boxes, in original pixels."""
        log = ErrorLog(text)
        result = read_grounded(log, geometry)
        if not result.items:
            log.add_empty()
        return ParseResult(result.items, tuple(log.errors), result.text)

    def items(self, sample: TextDetectionSample) -> tuple[GroundedPhrase, ...]:
        """The texts."""
        return tuple(GroundedPhrase(text.phrase, text.boxes) for text in sample.texts)
