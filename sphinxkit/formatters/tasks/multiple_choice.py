"""Questions with lettered choices."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

from sphinxkit.errors import DataError
from sphinxkit.formatters.tasks.base import ErrorLog, Example, ParseResult, Task, register, require
from sphinxkit.geometry import ImageGeometry

LETTERS = string.ascii_uppercase

# Where a letter is looked for, the surest place first. "A" and "I" in front of other words are words themselves.
_PLACES = (
    re.compile(r"\b[Aa]nswer(?:\s{1,4}is)?\s{0,4}:?\s{0,4}\(?([A-Z])\b"),  # "the answer is B"
    re.compile(r"\A\(?([A-Z])(?:[).:,]|$)"),  # "B. Low", "(B)"
    re.compile(r"\b(?:is|[Oo]ption|[Cc]hoice)\s{1,4}\(?([A-Z])\b(?!\s{0,4}\w)"),  # "I think it is B."
    re.compile(r"\A([B-HJ-Z])\s"),  # "B low"
)


_MARKUP = re.compile("[*`]|__")  # Markdown's bold, italics and code


def _find_letter(words: str) -> str | None:
    """The letter in an answer of other words."""
    words = _MARKUP.sub("", words).strip()
    if len(words) == 1 and words.upper() in LETTERS:
        return words.upper()
    return next((found.group(1) for place in _PLACES if (found := place.search(words))), None)


@dataclass(frozen=True, slots=True)
class MultipleChoiceSample:
    """A question with choices, one of them right.

    Args:
        question: The question.
        choices: In the order of their letters, at most 26.
        answer: Index of the right choice.
        context: Text before the question; may be empty.
    """

    question: str
    choices: tuple[str, ...]
    answer: int
    context: str = ""


@register("multiple_choice")
class MultipleChoice(Task[MultipleChoiceSample, str]):
    """Multiple choice: ScienceQA, Q-Bench, SEED-Bench, MMBench.

    Args:
        answer_start: Text before the letter; ScienceQA was evaluated with "The answer is".
    Source: the SPHINX authors' published evaluation prompts (last line, layout of question and choices as in its
        Q-Bench annotations); the other wording is our choice.
    """

    name = "multiple_choice"
    metric = "accuracy"
    wordings = (
        "{question}\nAnswer with the option's letter from the given choices directly.",
        "{question}\nWhich choice is right? Answer with its letter.",
    )

    def __init__(self, answer_start: str = "") -> None:
        self.answer_start = answer_start.strip()

    def prompt(self, question: str, choices: Sequence[str] = (), context: str = "", wording: int = 0) -> str:
        """The instruction.

        Args:
            question: The question; with its choices in it if ``choices`` is empty.
            choices: At most 26.
            context: Text before the question.
            wording: Index of the wording.
        Raises:
            DataError: The question or a choice is empty, too many choices, or no such wording.
        """
        question = require(self.name, "question", question)
        if len(choices) > len(LETTERS):
            raise DataError(f"task {self.name!r}: {len(choices)} choices, at most {len(LETTERS)} have a letter")
        lines = [f"Context:\n{context.strip()}"] if context.strip() else []
        if choices:
            lines += [f"Question:\n{question}", "Choices:"]
            lines += [f"{letter}. {require(self.name, 'choice', text)}" for letter, text in zip(LETTERS, choices)]  # noqa: B905
        else:
            lines.append(question)
        return self.instruction(wording, question="\n".join(lines))

    def format(self, sample: MultipleChoiceSample, wording: int = 0) -> Example:
        """The sample as question and answer.

        Raises:
            DataError: As ``prompt``; or no choice has the index of the answer.
        """
        instruction = self.prompt(sample.question, sample.choices, sample.context, wording)
        return Example(instruction, f"{self.answer_start} {self._letter(sample)}".strip())

    def _letter(self, sample: MultipleChoiceSample) -> str:
        if not 0 <= sample.answer < len(sample.choices):
            raise DataError(f"task {self.name!r}: answer {sample.answer} is none of {len(sample.choices)} choices")
        return LETTERS[sample.answer]

    def parse(self, text: str, geometry: ImageGeometry | None = None) -> ParseResult[str]:
        """The letter: alone (a small one is a repair), first ("B. Low", "(B)") or stated ("the answer is **B**")."""
        words = text.strip()
        strict = words.removeprefix(self.answer_start).strip() if self.answer_start else words
        if len(strict) == 1 and strict in LETTERS:
            return ParseResult((strict,), (), words)
        log = ErrorLog(text)
        if not words:
            log.add("empty", 0, len(text), is_repaired=False)
            return ParseResult((), tuple(log.errors))
        letter = _find_letter(strict)
        log.add("wording", 0, len(text), is_repaired=letter is not None)
        return ParseResult(() if letter is None else (letter,), tuple(log.errors), words)

    def items(self, sample: MultipleChoiceSample) -> tuple[str, ...]:
        """The right letter.

        Raises:
            DataError: No choice has the index of the answer.
        """
        return (self._letter(sample),)
