"""Questions with a short answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sphinxkit.formatters.tasks.base import Example, ParseResult, Task, register, require
from sphinxkit.formatters.tasks.words import read_words
from sphinxkit.geometry import ImageGeometry


@dataclass(frozen=True, slots=True)
class QuestionSample:
    """A question about an image.

    Args:
        question: The question.
        answer: A word or a phrase.
    """

    question: str
    answer: str


@register("vqa")
class VQA(Task[QuestionSample, str]):
    """Visual question answering with short answers: VQAv2, OKVQA, GQA, TextVQA, DocVQA, ChartQA, OCR-VQA, AI2D, MME.

    Source: the SPHINX authors' published evaluation prompts (default wording); the other wordings are our choice.
    """

    name = "vqa"
    metric = "vqa_accuracy"
    wordings: ClassVar[tuple[str, ...]] = (
        "{question}\nAnswer the question using a single word or phrase.",
        "{question}\nAnswer with one word or a short phrase.",
        "{question}\nGive a short answer.",
    )

    def prompt(self, question: str, wording: int = 0) -> str:
        """The instruction.

        Raises:
            DataError: The question is empty, or there is no such wording.
        """
        return self.instruction(wording, question=question)

    def format(self, sample: QuestionSample, wording: int = 0) -> Example:
        """The sample as question and answer.

        Raises:
            DataError: The question or the answer is empty, or there is no such wording.
        """
        return Example(self.prompt(sample.question, wording), require(self.name, "answer", sample.answer))

    def parse(self, text: str, geometry: ImageGeometry | None = None) -> ParseResult[str]:
        """The answer's words; the image size is not used."""
        return read_words(text)

    def items(self, sample: QuestionSample) -> tuple[str, ...]:
        """The answer."""
        return (sample.answer.strip(),)


@register("vizwiz")
class VizWiz(VQA):
    """VizWiz: questions by blind people, some of which cannot be answered.

    Source: the SPHINX authors' published evaluation prompts (default wording); the other wording is our choice.
    """

    name = "vizwiz"
    wordings = (
        "{question} When the provided information is insufficient, respond with 'Unanswerable'.\n"
        "Answer the question using a single word or phrase.",
        "{question}\nAnswer with one word or a short phrase, or 'Unanswerable' if the image does not tell.",
    )
