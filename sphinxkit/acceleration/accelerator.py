"""Text generation through fused layers, prepared at the first generation."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sphinxkit.acceleration.cpu.attention import BlockedAttention
from sphinxkit.acceleration.fused import FusedLayers
from sphinxkit.acceleration.quantization import QuantizedLinear
from sphinxkit.acceleration.snapshot import Snapshot
from sphinxkit.llama.attention import Attention
from sphinxkit.llama.backends import AutoAttention
from sphinxkit.llama.block import LlamaBlock
from sphinxkit.llama.cache import KVCache
from sphinxkit.llama.layers import RMSNorm, SwiGLU
from sphinxkit.llama.model import LlamaModel, last_positions, select_positions

_PARTS = {"attention_norm": RMSNorm, "attention": Attention, "mlp_norm": RMSNorm, "mlp": SwiGLU}


class FusedAccelerator:
    """``llama.Accelerator`` by joint projections and, on CPUs, a kernel for few rows and attention in blocks.

    The weights are fused once, under a lock, when the first prompt is read. Every pass checks that the model has not
    changed since (``Snapshot``). In training mode, or with a hook registered anywhere below the model, generation uses
    the plain modules. It also does so after weights were moved or replaced, until the next prompt fuses them again.
    Adapters and other tensor types cannot be fused.

    Weights whose memory is shared with tensors held elsewhere (an earlier state dict, a view) are not fused. The reason
    for not accelerating a model is logged at level INFO.

    Copies and pickles of the model get their own, unprepared accelerator.

    Args:
        use_gemv: See ``FusedLayers``.
    """

    def __init__(self, *, use_gemv: bool = True) -> None:
        self._use_gemv = use_gemv
        self._lock = threading.Lock()
        self._fused: FusedLayers | None = None
        self._told: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles."""
        return partial(type(self), use_gemv=self._use_gemv), ()

    def prefill(
        self,
        model: LlamaModel,
        embeds: Tensor,
        cache: KVCache,
        lengths: Sequence[int] | Tensor | None,
        all_positions: bool,
    ) -> Tensor:
        """See ``LlamaModel.prefill``. Shape: as there."""
        positions = None if all_positions else last_positions(lengths)
        return self._run(model, self.prepare(model), embeds, cache, lengths, positions)

    def decode(self, model: LlamaModel, token_ids: Tensor, cache: KVCache) -> Tensor:
        """See ``LlamaModel.decode``. Shape: as there."""
        return self._run(model, self.current(model), model.embed(token_ids), cache, None, None)

    def cache_capacity(self, capacity: int, limit: int) -> int:
        """What was asked for."""
        return capacity

    def reset(self) -> None:
        """Drop the fused weights; the parameters stay where they are."""
        self._fused = None

    def current(self, model: LlamaModel) -> FusedLayers | None:
        """The fused layers, if they are prepared and the model is unchanged."""
        fused = self._fused
        if fused is None or model.training or fused.snapshot.is_watched() or not fused.snapshot.is_same():
            return None
        return fused

    def prepare(self, model: LlamaModel) -> FusedLayers | None:
        """The fused layers, prepared now if necessary; None if generation uses the plain modules."""
        fused = self.current(model)
        if fused is not None:
            return fused
        with self._lock:
            fused = self.current(model)  # another thread may have made them meanwhile
            if fused is not None:
                return fused
            reason = obstacle(model)
            if reason is None:
                self._fused = None  # lets go of the memory before it is needed again
                try:
                    self._fused = FusedLayers(model, use_gemv=self._use_gemv)
                except TypeError as error:
                    reason = str(error)
            if reason is not None and reason != self._told:
                logging.getLogger(__name__).info("text is generated through the plain modules: %s", reason)
            self._told = reason
            return self._fused if reason is None else None

    @torch.no_grad()
    def _run(
        self,
        model: LlamaModel,
        layers: FusedLayers | None,
        embeds: Tensor,
        cache: KVCache,
        lengths: Sequence[int] | Tensor | None,
        output_positions: Tensor | slice | None,
    ) -> Tensor:
        if layers is None:
            logits: Tensor = model(embeds, cache=cache, lengths=lengths, output_positions=output_positions)
            return logits
        is_left_to_us = isinstance(model.attention_backend, AutoAttention) and embeds.device.type == "cpu"
        backend = BlockedAttention() if is_left_to_us else None
        context = model.attention_context(embeds, cache=cache, lengths=lengths, backend=backend)
        hidden = layers(embeds, context)
        if context.cache_write is not None:
            cache.advance(context.cache_write)
        return layers.project(model.norm(select_positions(hidden, output_positions)), model.lm_head)


def obstacle(model: LlamaModel) -> str | None:
    """Reason why generation must use the plain modules; None if there is none.

    Args:
        model: The object in place of a ``LlamaModel``.
    """
    if type(model) is not LlamaModel:
        return f"the model is a {type(model).__name__}"
    if model.training:
        return "the model is in training mode"
    if Snapshot(model, (model.embed_tokens, model.norm)).is_watched():
        return "a hook or a forward function was set on one of its modules"
    for index, layer in enumerate(model.layers):
        if type(layer) is not LlamaBlock:
            return f"layers.{index} is a {type(layer).__name__}"
        for name, part in layer.named_children():
            if type(part) is not _PARTS.get(name):
                return f"layers.{index}.{name} is a {type(part).__name__}"
        for name, part in (*layer.attention.named_children(), *layer.mlp.named_children()):
            if name in ("q_norm", "k_norm") and type(part) is RMSNorm:
                continue
            has_bias = getattr(part, "bias", None) is not None and name not in ("q_proj", "k_proj", "v_proj")
            if type(part) not in (QuantizedLinear, nn.Linear) or has_bias:
                return f"layers.{index}: {name} is a {type(part).__name__}, expected one without bias or adapter"
    return None
