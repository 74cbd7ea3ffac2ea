"""Attention by torch's ``scaled_dot_product_attention``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sphinxkit.llama.backends.base import HALF_DTYPES, AttentionBackend, AttentionPattern, registry, repeat_heads

# Without a mask, torch's kernel on a CPU makes 0 of NaN in queries and keys where there are fewer keys than this: no
# whole vector of float32 (AVX-512). A model with NaN would answer as if nothing were wrong. Seen with torch 2.14.1.
_DROPPED_NAN = 16


@registry.register("sdpa")
class SDPAAttention(AttentionBackend):
    """torch's scaled_dot_product_attention, kept away from its slow corners.

    - Packed samples are looped over: exact, and on a CPU 3 to 5 times faster than a dense mask.
    - In a decoding step a group of query heads becomes the query axis of its key head, so no key is repeated. In 16 bit
      on a CPU a single query is doubled: torch's kernel takes about twice as long with one query as with two.
    """

    name = "sdpa"

    def prepare(self, pattern: AttentionPattern, dtype: torch.dtype) -> Tensor | None:
        """An additive mask for rows that differ, a cached prefix or a window; None where a flag or nothing will do."""
        write = pattern.write
        is_whole = write is None or (
            pattern.width == 1 and write.start is not None and write.num_keys == write.start + 1
        )
        num_keys = pattern.width if write is None else write.num_keys
        is_dropping = pattern.device.type == "cpu" and num_keys < _DROPPED_NAN
        if is_whole and pattern.window is None and not is_dropping:
            return None
        mask = pattern.mask()
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, state: Any) -> Tensor:
        """See ``AttentionBackend.attend``. Shape: as there."""
        if pattern.is_token():
            return self._decode(q, k, v, state)
        k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
        if state is not None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=state)
        if pattern.seq_lens is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        queries, keys, values = (torch.split(x, list(pattern.seq_lens), dim=2) for x in (q, k, v))
        samples = zip(queries, keys, values, strict=True)
        return torch.cat([F.scaled_dot_product_attention(*sample, is_causal=True) for sample in samples], dim=2)

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """One query per row and head: (B, H, 1, D)."""
        folded = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
        group = folded.shape[2]
        if group == 1 and q.dtype in HALF_DTYPES and q.device.type == "cpu":
            folded = folded.expand(-1, -1, 2, -1)
        return F.scaled_dot_product_attention(folded, k, v, attn_mask=mask)[:, :, :group].reshape(q.shape)
