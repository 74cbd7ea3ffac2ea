"""The answer to a task's question, parsed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sphinxkit.errors import DataError
from sphinxkit.formatters import ConversationTemplate
from sphinxkit.formatters.tasks import ParseError, ParseResult, Task, TaskQuestion, make_question
from sphinxkit.generation import Generation
from sphinxkit.geometry import ImageGeometry
from sphinxkit.sphinx_model.images import ImageInput

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class TaskAnswer:
    """What a model answered to a task's question.

    Args:
        question: The task's question.
        prompt: The full prompt.
        generation: The generated text and tokens.
        result: Output of the task's parser.
    """

    question: TaskQuestion
    prompt: str
    generation: Generation
    result: ParseResult[Any]

    @property
    def text(self) -> str:
        """The answer's text, stripped of surrounding white space."""
        return self.generation.text.strip()

    @property
    def items(self) -> tuple[Any, ...]:
        """The parsed items (boxes, phrases, key points, words), in pixels of the image."""
        return self.result.items

    @property
    def failures(self) -> tuple[ParseError, ...]:
        """Parts of the answer that could not be read."""
        return self.result.failures


def uncertainty(template: ConversationTemplate | None, confidence: float | None) -> str | None:
    """A note where an answer is uncertain by the model's own measure, or None.

    Args:
        template: The model's; its ``low_confidence`` is the threshold.
        confidence: The answer's; see ``Generation``.
    """
    limit = None if template is None else template.low_confidence
    if limit is None or confidence is None or confidence >= limit:
        return None
    return (
        f"low confidence ({confidence:.2f}, usual are {limit:.2f} and above): the picture or the question may be of a "
        "kind that this model does not know"
    )


def read_question(
    task: str | Task[Any, Any] | TaskQuestion, image: ImageInput, fields: Mapping[str, Any]
) -> tuple[Image, TaskQuestion]:
    """Open the image and make the question about it; see ``SphinxModel.ask``.

    Args:
        task: A task, the name of a task, or a finished question.
        image: Path, bytes, PIL image or array; not a tensor.
        fields: Values for the question's placeholders.
    Raises:
        RegistryError: There is no such task.
        DataError: A tensor, an image that cannot be read, or fields that the task refuses.
    """
    from sphinxkit.tilers import load_image

    if isinstance(image, Tensor):
        raise DataError("ask: expected an image, got a tensor, which does not tell the image's own size")
    picture = load_image(image)
    if not isinstance(task, TaskQuestion):
        return picture, make_question(task, ImageGeometry(*picture.size), **fields)
    if fields:
        raise DataError(f"ask: the question is worded already, got also {next(iter(fields))}=")
    return picture, task
