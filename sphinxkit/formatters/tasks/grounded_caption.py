"""Grounded captions: a box for each named object."""

from __future__ import annotations

from dataclasses import dataclass

from sphinxkit.errors import DataError
from sphinxkit.formatters.tasks.base import ErrorLog, Example, FixedTask, GroundedPhrase, ParseResult, register
from sphinxkit.formatters.tasks.grounding import escape, read_grounded, write_grounded
from sphinxkit.geometry import ImageGeometry


@dataclass(frozen=True, slots=True)
class GroundedCaptionSample:
    """A caption, some of whose phrases have boxes.

    Args:
        caption: Without white space around it.
        phrases: In the order of the caption, each with its ``start`` in it and at least one box, in original pixels.
        geometry: The image's size.
    """

    caption: str
    phrases: tuple[GroundedPhrase, ...]
    geometry: ImageGeometry


@register("grounded_caption")
class GroundedCaption(FixedTask[GroundedCaptionSample, GroundedPhrase]):
    """Grounded captions: Flickr30k Entities. ``ParseResult.text`` is the caption without markup.

    Source: the SPHINX authors' published prompts (default wording); the other wording is our choice.
    """

    name = "grounded_caption"
    metric = "grounded_recall"
    wordings = (
        "Describe the image concisely. Include the bounding box for each mentioned object.",
        "Describe the image in one sentence and give the bounding box of everything that you name.",
    )

    def format(self, sample: GroundedCaptionSample, wording: int = 0) -> Example:
        """The sample as question and answer.

        Raises:
            DataError: The caption is empty or has white space around it, a phrase is not where it says, overlaps
                another or has no box, a box is not inside the image, or there is no such wording.
        """
        caption = sample.caption
        if not caption or caption != caption.strip():
            raise DataError(f"task {self.name!r}: the caption is empty or has white space around it: {caption[:80]!r}")
        parts = []
        done = 0
        for phrase in sample.phrases:
            start = phrase.start
            if start is None or start < done or not caption.startswith(phrase.phrase, start):
                raise DataError(f"task {self.name!r}: {phrase.phrase!r} is not at {start} of {caption!r}, or overlaps")
            if not phrase.boxes:
                raise DataError(f"task {self.name!r}: {phrase.phrase!r} has no box")
            parts += [escape(caption[done:start]), write_grounded(self.name, phrase, sample.geometry)]
            done = start + len(phrase.phrase)
        return Example(self.prompt(wording), "".join([*parts, escape(caption[done:])]))

    def parse(self, text: str, geometry: ImageGeometry) -> ParseResult[GroundedPhrase]:
        """The phrases with their boxes, in original pixels, and their places in the plain caption."""
        log = ErrorLog(text)
        result = read_grounded(log, geometry, running_text=True)
        if not result.text:
            log.add("empty", 0, len(text), is_repaired=False)
        return ParseResult(result.items, tuple(log.errors), result.text)

    def items(self, sample: GroundedCaptionSample) -> tuple[GroundedPhrase, ...]:
        """The phrases."""
        return sample.phrases
