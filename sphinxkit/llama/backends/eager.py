"""Attention by two matrix products and a softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sphinxkit.llama.backends.base import AttentionBackend, AttentionPattern, registry, repeat_heads


@registry.register("eager")
class EagerAttention(AttentionBackend):
    """Two matrix products and a softmax in float32: slow and plain, to compare the others with."""

    name = "eager"

    def prepare(self, pattern: AttentionPattern, dtype: torch.dtype) -> Tensor:
        """The dense mask."""
        return pattern.mask()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, state: Any) -> Tensor:
        """See ``AttentionBackend.attend``. Shape: as there."""
        compute = torch.promote_types(q.dtype, torch.float32)
        k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
        scores = (q.to(compute) @ k.to(compute).transpose(-1, -2)) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~state, -torch.inf).softmax(-1)
        out: Tensor = (weights @ v.to(compute)).to(q.dtype)
        return out
