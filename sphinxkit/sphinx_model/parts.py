"""What prompts, scores and sessions ask of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sphinxkit.formatters import ConversationTemplate, Message
    from sphinxkit.llama import LlamaModel
    from sphinxkit.tokenizer import Tokenizer
    from sphinxkit.vision import VisionTower


class ModelParts(Protocol):
    """The parts of a model that answers; ``SphinxModel`` is one."""

    llm: LlamaModel
    conversation: ConversationTemplate | None

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end an answer, beside the tokenizer's end-of-sentence."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the language model's weights."""
        ...

    def require_vision(self) -> VisionTower:
        """Return the vision tower, or raise DataError if the model has none."""
        ...

    def require_tokenizer(self) -> Tokenizer:
        """Return the tokenizer, or raise DataError if the model has none."""
        ...

    def preprocess(self, images: Any) -> Tensor:
        """Pixels (B, 3, S, S) of images."""
        ...

    def encode_images(self, pixels: Tensor, max_views: int | None = None) -> Tensor:
        """Image tokens (B, N_img, D) of pixels (B, 3, S, S)."""
        ...

    def chat_prompt(self, messages: str | Sequence[Message], answer_start: str = "") -> tuple[str, tuple[str, ...]]:
        """A conversation as a prompt, and the strings that end the answer."""
        ...
