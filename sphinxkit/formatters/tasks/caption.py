"""Describing the whole image, shortly or at length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sphinxkit.formatters.tasks.base import Example, FixedTask, ParseResult, register, require
from sphinxkit.formatters.tasks.words import read_words
from sphinxkit.geometry import ImageGeometry


@dataclass(frozen=True, slots=True)
class CaptionSample:
    """An image's description.

    Args:
        caption: The caption.
    """

    caption: str


@register("caption")
class Caption(FixedTask[CaptionSample, str]):
    """One sentence about the image: COCO captions, TextCaps.

    Source: the SPHINX authors' published prompts (default wording); the other wordings are our choice.
    """

    name = "caption"
    metric = "caption"
    wordings: ClassVar[tuple[str, ...]] = (
        "Provide a one-sentence caption for the provided image.",
        "Describe the image in one sentence.",
        "What does the image show? Answer in one sentence.",
    )

    def format(self, sample: CaptionSample, wording: int = 0) -> Example:
        """The sample as question and answer.

        Raises:
            DataError: The caption is empty, or there is no such wording.
        """
        return Example(self.prompt(wording), require(self.name, "caption", sample.caption))

    def parse(self, text: str, geometry: ImageGeometry | None = None) -> ParseResult[str]:
        """The caption; the image size is not used."""
        return read_words(text)

    def items(self, sample: CaptionSample) -> tuple[str, ...]:
        """The caption."""
        return (sample.caption.strip(),)


@register("detailed_caption")
class DetailedCaption(Caption):
    """A paragraph about the image: LLaVA's detailed descriptions.

    Source: the SPHINX authors' published prompts (default wording); the other wordings are our choice.
    """

    name = "detailed_caption"
    wordings = (
        "Generate a detailed description about the image.",
        "Describe the image in detail.",
        "Tell me everything that can be seen in the image.",
    )
