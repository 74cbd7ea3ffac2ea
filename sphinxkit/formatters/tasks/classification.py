"""Naming the class of an image."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sphinxkit.formatters.tasks.base import ErrorLog, Example, FixedTask, ParseResult, register, require
from sphinxkit.geometry import ImageGeometry

_SENTENCE = re.compile(r"\s*(?:this|it|the image)\s{1,4}(?:is|shows)\s{1,4}(?:an?|the)?\s", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ClassificationSample:
    """An image's class.

    Args:
        label: Name of the class.
    """

    label: str


@register("classification")
class Classification(FixedTask[ClassificationSample, str]):
    """Image classification.

    Source: the SPHINX authors' published prompts (default wording and answer); the other wordings are our choice.
    """

    name = "classification"
    metric = "accuracy"
    wordings = ("Classify the image.", "What is this?", "Name the class of the image.")

    def format(self, sample: ClassificationSample, wording: int = 0) -> Example:
        """The sample as question and answer.

        Raises:
            DataError: The label is empty, or there is no such wording.
        """
        return Example(self.prompt(wording), f"This is a {require(self.name, 'label', sample.label)}.")

    def parse(self, text: str, geometry: ImageGeometry | None = None) -> ParseResult[str]:
        """The label; a bare label and "This is an ..." are repairs."""
        words = text.strip()
        if words.startswith("This is a ") and words.endswith(".") and words[10:-1].strip():
            return ParseResult((words[10:-1].strip(),), (), words)
        log = ErrorLog(text)
        opening = _SENTENCE.match(words)
        label = (words[opening.end() :] if opening else words).strip()
        label = label.removesuffix(".").rstrip()
        log.add("wording" if label else "empty", 0, len(text), is_repaired=bool(label))
        return ParseResult((label,) if label else (), tuple(log.errors), words)

    def items(self, sample: ClassificationSample) -> tuple[str, ...]:
        """The label."""
        return (sample.label.strip(),)
