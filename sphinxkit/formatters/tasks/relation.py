"""Visual relation detection."""

from __future__ import annotations

from dataclasses import dataclass

from sphinxkit.errors import DataError
from sphinxkit.formatters.tasks.base import ErrorLog, Example, GroundedPhrase, ParseResult, Task, register, require
from sphinxkit.formatters.tasks.grounding import read_grounded, write_grounded
from sphinxkit.geometry import ImageGeometry


@dataclass(frozen=True, slots=True)
class RelationSample:
    """A subject, what it does, and an object.

    Args:
        subject: With at least one box, in original pixels.
        predicate: The predicate.
        object: The object, with at least one box in original pixels.
        geometry: The image's size.
    """

    subject: GroundedPhrase
    predicate: str
    object: GroundedPhrase
    geometry: ImageGeometry


@register("relation")
class Relation(Task[RelationSample, GroundedPhrase]):
    """Visual relations: the boxes of subject and object. Visual Genome.

    Source: the SPHINX authors' published prompts (default wording, with its space in front of the colon, which keeps it
        apart from REC's); the order subject, object and the other wording are our choice.
    """

    name = "relation"
    metric = "relation_recall"
    wordings = (
        "Please provide the bounding box coordinate of the region this sentence describes : {phrase}.",
        "Give the bounding boxes of both sides of this relation: {phrase}.",
    )

    def prompt(self, phrase: str, wording: int = 0) -> str:
        """The instruction.

        Args:
            phrase: Subject, predicate and object, as a sentence.
            wording: Index of the wording.
        Raises:
            DataError: The phrase is empty, or there is no such wording.
        """
        return self.instruction(wording, phrase=phrase)

    def format(self, sample: RelationSample, wording: int = 0) -> Example:
        """The sample as question and answer.

        Raises:
            DataError: A text is empty, a side has no box, a box is not inside the image, or there is no such wording.
        """
        sides = self.items(sample)
        words = [sides[0].phrase, require(self.name, "predicate", sample.predicate), sides[1].phrase]
        answer = " ".join(write_grounded(self.name, side, sample.geometry) for side in sides)
        return Example(self.prompt(" ".join(words), wording), answer)

    def parse(self, text: str, geometry: ImageGeometry) -> ParseResult[GroundedPhrase]:
        """Subject and object with their boxes, in original pixels."""
        log = ErrorLog(text)
        result = read_grounded(log, geometry)
        if len(result.items) != 2:
            log.add("wrong_count", 0, len(text), is_repaired=len(result.items) > 2)
        return ParseResult(result.items[:2], tuple(log.errors), result.text)

    def items(self, sample: RelationSample) -> tuple[GroundedPhrase, ...]:
        """Subject and object.

        Raises:
            DataError: One of them has no box.
        """
        for side in (sample.subject, sample.object):
            if not side.boxes:
                raise DataError(f"task {self.name!r}: {side.phrase!r} has no box")
        return tuple(GroundedPhrase(side.phrase, side.boxes) for side in (sample.subject, sample.object))
