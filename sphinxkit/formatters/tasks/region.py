"""Regions: referring expression comprehension (REC) and generation (REG)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sphinxkit.formatters.tasks.base import ErrorLog, Example, ParseResult, Task, register, require
from sphinxkit.formatters.tasks.coordinates import check_box, is_empty, read_boxes, write_boxes
from sphinxkit.formatters.tasks.grounding import Scanner
from sphinxkit.formatters.tasks.words import read_words
from sphinxkit.geometry import Box, ImageGeometry

_NUMBERS = re.compile(r"[-+.0-9][-+.0-9eE,;\s]*+")


@dataclass(frozen=True, slots=True)
class RegionSample:
    """A region of an image and the words for it.

    Args:
        phrase: Words that describe the region.
        box: In original pixels.
        geometry: The image's size.
    """

    phrase: str
    box: Box
    geometry: ImageGeometry


@register("rec")
class REC(Task[RegionSample, Box]):
    """Referring expression comprehension: the box of a phrase. RefCOCO, RefCOCO+, RefCOCOg, Visual Genome.

    Source: the SPHINX authors' published prompts (default wording); the other wordings are our choice.
    """

    name = "rec"
    metric = "precision_at_1"
    wordings = (
        "Please provide the bounding box coordinate of the region this sentence describes: {phrase}.",
        "Where is {phrase}? Answer with its bounding box.",
        "Give the bounding box of {phrase}.",
    )

    def prompt(self, phrase: str, wording: int = 0) -> str:
        """The instruction.

        Raises:
            DataError: The phrase is empty, or there is no such wording.
        """
        return self.instruction(wording, phrase=phrase)

    def format(self, sample: RegionSample, wording: int = 0) -> Example:
        """The sample as question and answer.

        Raises:
            DataError: The phrase is empty, the box is not inside the image, or there is no such wording.
        """
        return Example(self.prompt(sample.phrase, wording), write_boxes(self.name, [sample.box], sample.geometry))

    def parse(self, text: str, geometry: ImageGeometry) -> ParseResult[Box]:
        """The first box of the answer, in original pixels."""
        log = ErrorLog(text)
        boxes: list[Box] = []
        has_list = False
        for group in Scanner(log, running_text=False).groups():
            for start, end in group.lists:
                has_list |= not is_empty(text[start:end])
                boxes += read_boxes(log, start, end, geometry)
            if len(boxes) > 1:
                break
        if not has_list:
            log = ErrorLog(text)  # its numbers, if any, were extra text to the scanner
            boxes = self._read_bare(log, geometry)
        if len(boxes) > 1:
            log.add("wrong_count", 0, len(text), is_repaired=True)
        return ParseResult(tuple(boxes[:1]), tuple(log.errors))

    @staticmethod
    def _read_bare(log: ErrorLog, geometry: ImageGeometry) -> list[Box]:
        """Four numbers without an opening bracket."""
        text = log.text
        place = next((m for m in _NUMBERS.finditer(text) if len(m.group().replace(",", " ").split()) >= 4), None)
        if place is None:
            log.add("no_coordinates", 0, len(text), is_repaired=False)
            return []
        log.add("missing_open_bracket", *place.span(), is_repaired=True)
        if text[: place.start()].strip() or text[place.end() :].strip(" \n]"):
            log.add("extra_text", 0, len(text), is_repaired=True)
        return list(read_boxes(log, *place.span(), geometry))

    def items(self, sample: RegionSample) -> tuple[Box, ...]:
        """The box, inside the image.

        Raises:
            DataError: The box is not inside the image.
        """
        return (check_box(self.name, sample.box, sample.geometry),)


@register("reg")
class REG(Task[RegionSample, str]):
    """Referring expression generation: the words for a box.

    Source: our choice of words, in the style of REC's.
    """

    name = "reg"
    metric = "caption"
    wordings = (
        "Please provide a short description for this region: {box}.",
        "What is in the region {box}?",
        "Describe the region {box} in a few words.",
    )

    def prompt(self, box: Box, geometry: ImageGeometry, wording: int = 0) -> str:
        """The instruction.

        Args:
            box: In original pixels.
            geometry: The image's size.
            wording: Index of the wording.
        Raises:
            DataError: The box is not inside the image, or there is no such wording.
        """
        return self.instruction(wording, box=write_boxes(self.name, [box], geometry))

    def format(self, sample: RegionSample, wording: int = 0) -> Example:
        """The sample as question and answer.

        Raises:
            DataError: The phrase is empty, the box is not inside the image, or there is no such wording.
        """
        instruction = self.prompt(sample.box, sample.geometry, wording)
        return Example(instruction, require(self.name, "phrase", sample.phrase))

    def parse(self, text: str, geometry: ImageGeometry | None = None) -> ParseResult[str]:
        """The words; the image size is not used."""
        return read_words(text)

    def items(self, sample: RegionSample) -> tuple[str, ...]:
        """The words."""
        return (sample.phrase.strip(),)
