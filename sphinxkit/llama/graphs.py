"""Decoding steps replayed as CUDA graphs: one launch instead of some thousand."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sphinxkit.errors import ShapeError
from sphinxkit.llama.cache import KVCache

if TYPE_CHECKING:
    from sphinxkit.llama.model import LlamaModel

Record = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
WARMUPS = 2  # torch asks for some runs on a side stream before a capture; the first fills caches of every library


class DecodeGraphs:
    """Records the step of one token per row over a cache, and replays it.

    The first step over a cache runs eagerly, the second is recorded, the others are replays. There is one graph at a
    time: another cache, or a smaller batch (``KVCache.keep_rows``), gets a new one. A recorded step reads weights and
    cache where they were when it was recorded.

    Args:
        model: On CUDA, in eval mode; fused, if it is to be.
        record: Makes a replayable function of one that runs the step and returns its logits; None: a CUDA graph.
    """

    def __init__(self, model: LlamaModel, record: Record | None = None) -> None:
        self._model = model
        self._record = _record_cuda_graph if record is None else record
        self._cache: KVCache | None = None
        self._lengths: Tensor | None = None
        self._tokens: Tensor | None = None
        self._replay: Callable[[], Tensor] | None = None

    def clear(self) -> None:
        """Forget the recorded step and its cache; for when weights were moved or replaced."""
        self._cache = self._lengths = self._tokens = self._replay = None

    def __call__(self, token_ids: Tensor, cache: KVCache) -> Tensor:
        """Logits of the token after ``token_ids``, which the cache holds afterwards.

        Args:
            token_ids: The last token of each row.
            cache: With static shapes; ``prefill`` has filled it.
        Shape:
            token_ids: (B, 1)
            return: (B, 1, V), a tensor of its own
        Raises:
            ShapeError: The cache has no static shapes, the ids are not (B, 1), or a row is full.
        """
        if not cache.static_shapes:
            raise ShapeError("CUDA graphs need a cache with static shapes (static_shapes=True)")
        if token_ids.shape != (cache.batch_size, 1):
            raise ShapeError(f"expected token ids ({cache.batch_size}, 1), got {tuple(token_ids.shape)}")
        if self._cache is not cache or self._lengths is not cache.lengths:
            self.clear()
            self._cache, self._lengths = cache, cache.lengths
            return self._eager(token_ids, cache)
        if self._replay is None or self._tokens is None:
            if not cache.has_room(WARMUPS + 1):
                return self._eager(token_ids, cache)
            tokens = token_ids.clone()
            with cache.rehearsal():
                self._replay = self._record(lambda: self._eager(tokens, cache))
            self._tokens = tokens
        cache.claim(1)
        self._tokens.copy_(token_ids)
        return self._replay().clone()

    def _eager(self, token_ids: Tensor, cache: KVCache) -> Tensor:
        logits: Tensor = self._model(self._model.embed(token_ids), cache=cache)
        return logits


def _record_cuda_graph(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(WARMUPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        logits = run()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay
