"""Multi-head attention with grouped keys, rotary positions and an optional cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sphinxkit.llama.backends.base import AttentionBackend, AttentionPattern
from sphinxkit.llama.cache import CacheWrite, KVStore
from sphinxkit.llama.layers import RMSNorm
from sphinxkit.llama.rope import apply_rope


@dataclass(frozen=True, slots=True, eq=False)
class AttentionContext:
    """State shared by all layers in one forward pass; made by ``LlamaModel.attention_context``.

    It is one opaque object on purpose: wrappers that cast the floating-point arguments of a layer to 16 bit (FSDP)
    do not look inside, so ``freqs_cis`` stays complex64.

    Args:
        freqs_cis: From ``precompute_freqs_cis``.
        pattern: Which keys each query attends to.
        backend: A resolved backend.
        state: Result of ``backend.prepare(pattern)``.
        cache: Cache for keys and values, or None.
        cache_write: Positions in the cache.
        add_balance_loss: Takes the balance loss of every mixture of experts; None: none is computed. A function:
            FSDP copies lists.
    """

    freqs_cis: Tensor
    pattern: AttentionPattern
    backend: AttentionBackend
    state: Any
    cache: KVStore | None = None
    cache_write: CacheWrite | None = None
    add_balance_loss: Callable[[Tensor], None] | None = None


class Attention(nn.Module):
    """Self-attention of one LLaMA layer.

    The number of heads follows from the projected widths, so projections sharded over heads work unchanged.

    Args:
        embed_dim: Width of a token, D.
        num_heads: Query heads, H.
        num_kv_heads: Key and value heads, Hkv; divides H.
        head_dim: Channels of a head.
        qkv_bias: Whether queries, keys and values have a bias.
        qk_norm_eps: Epsilon of an RMS norm on each head's query and key, before the rotation; None: no norm.
    Shape:
        x: (B, S, D)
        return: (B, S, D)
    Source: LLaMA, arXiv:2302.13971, section 2.2; grouped queries: arXiv:2305.13245; biases: Qwen2, arXiv:2407.10671,
        section 2.2; norms of queries and keys: Qwen3, arXiv:2505.09388, section 2.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        qkv_bias: bool = False,
        qk_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(num_heads * head_dim, embed_dim, bias=False)
        self.q_norm = None if qk_norm_eps is None else RMSNorm(head_dim, qk_norm_eps)
        self.k_norm = None if qk_norm_eps is None else RMSNorm(head_dim, qk_norm_eps)

    def forward(self, x: Tensor, context: AttentionContext, layer: int) -> Tensor:
        """Attend.

        Args:
            x: Tokens (B, S, D).
            context: State shared by all layers.
            layer: Index of the layer, for the cache.
        """
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (project(x).view(heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, context.freqs_cis), apply_rope(k, context.freqs_cis)
        projected: Tensor = self.o_proj(attend(q, k, v, context, layer).to(x.dtype))
        return projected


def attend(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, layer: int) -> Tensor:
    """Attention of one layer between its projections, through the cache if there is one.

    Args:
        q: Rotated queries.
        k: Rotated keys.
        v: Values.
        context: State shared by all layers.
        layer: Index of the layer, for the cache.
    Shape:
        q: (B, S, H, D)
        k, v: (B, S, Hkv, D)
        return: (B, S, H*D), in the dtype of the cache if its keys were used
    """
    queries, keys, values = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if context.cache is not None and context.cache_write is not None:
        context.cache.write(layer, k, v, context.cache_write)
        if context.pattern.write is not None:
            keys, values = context.cache.read(layer, context.cache_write)
            queries = queries.to(keys.dtype)
    out = context.backend.attend(queries, keys, values, context.pattern, context.state)
    return out.transpose(1, 2).flatten(-2)
