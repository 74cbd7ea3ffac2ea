"""An answer to a task's question, and what it says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sphinxkit.formatters.tasks import ParseError, ParseResult, TaskQuestion
from sphinxkit.generation import Generation


@dataclass(frozen=True, slots=True)
class TaskAnswer:
    """What a model answered to a task's question.

    Args:
        question: What was asked.
        prompt: As the model read it.
        generation: As the model wrote it.
        result: What the task's parser made of it.
    """

    question: TaskQuestion
    prompt: str
    generation: Generation
    result: ParseResult[Any]

    @property
    def text(self) -> str:
        """The answer's words, without the white space around them."""
        return self.generation.text.strip()

    @property
    def items(self) -> tuple[Any, ...]:
        """What the answer says (boxes, phrases, key points, words), in pixels of the image."""
        return self.result.items

    @property
    def failures(self) -> tuple[ParseError, ...]:
        """Parts of the answer that could not be read."""
        return self.result.failures
