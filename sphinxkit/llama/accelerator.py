"""Protocol for accelerated prefill and decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from sphinxkit.llama.cache import KVCache

Model = TypeVar("Model", contravariant=True)


class Accelerator(Protocol[Model]):
    """Runs the passes of text generation in place of ``LlamaModel``'s modules; set as ``model.accelerator``.

    Results equal those of the modules up to the order of sums. It calls ``model.forward`` if it cannot run: for
    replaced weights, hooks, adapters, or a model in training mode. It keeps no reference to the model.
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
        """Capacity to allocate for a cache when ``capacity`` tokens, at most ``limit``, are requested."""
        ...

    def reset(self) -> None:
        """Drop prepared state, because the weights move to another device or dtype."""
        ...
