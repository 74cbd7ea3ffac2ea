"""What the model asks of something that reads prompts and decodes faster than its modules do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from sphinxkit.llama.cache import KVCache

Model = TypeVar("Model", contravariant=True)


class Accelerator(Protocol[Model]):
    """Runs the passes of text generation in place of ``LlamaModel``'s modules; set as ``model.accelerator``.

    It computes what the modules compute but for the order of sums, and calls ``model.forward`` where it cannot run: for
    weights that were replaced, hooks, adapters, a model in training mode. It keeps no reference to the model.
    """

    def prefill(
        self, model: Model, embeds: Tensor, cache: KVCache, lengths: Sequence[int] | Tensor | None, all_positions: bool
    ) -> Tensor:
        """See ``LlamaModel.prefill``, which has checked the input.

        Shape:
            embeds: (B, S, D)
            return: (B, 1, V), or (B, S, V)
        """
        ...

    def decode(self, model: Model, token_ids: Tensor, cache: KVCache) -> Tensor:
        """See ``LlamaModel.decode``, which has checked the input.

        Shape:
            token_ids: (B, 1)
            return: (B, 1, V)
        """
        ...

    def cache_capacity(self, capacity: int, limit: int) -> int:
        """How many tokens a cache is made for, where ``capacity`` of at most ``limit`` were asked for."""
        ...

    def reset(self) -> None:
        """Forget what was prepared: the weights move to another device or dtype."""
        ...
