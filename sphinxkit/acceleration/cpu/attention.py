"""Causal attention in 16 bit on a CPU in blocks of matrix products: long prompts, and packed samples in training."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sphinxkit.llama.backends import HALF_DTYPES, AttentionPattern, SDPAAttention
from sphinxkit.llama.backends.base import repeat_heads

MAX_LENGTH = 1024  # where torch's kernel, which keeps no weights, is as fast; they are 2 H n^2 bytes of a sample
_BLOCK = 128  # queries whose float32 scores are held at a time: they stay in the second-level cache; our choice
# In ``causal_attention``: queries at a time, and scores for each thread (12 MB with softmax and rounded copy);
# the more heads at a time, the better they are shared out. Best, or within 3 % of it, of 32 to 256 and 75k to 5M, for
# 600 to 1519 tokens of 16 to 40 heads and two threads.
_LONG_BLOCK, _SCORES = 64, 1_200_000


# Of a row that is read in blocks. At 256 tokens the calls cost more than they save (0.8 of torch's speed);
# at 512 and 1519 it is 1.4 times as fast; at 4000 the blocks are narrow (0.94). 16 heads of 64 channels, one thread.
BLOCKED_LENGTHS = range(512, 2049)


class BlockedAttention(SDPAAttention):
    """torch's SDPA, with two of its slow cases on a CPU replaced.

    - Rows of 512 to 2048 tokens in bfloat16 without gradients, on a CPU with bfloat16 instructions but without matrix
      tiles (AMX), go through ``causal_attention``.
    - Packed samples of up to 1024 tokens in 16 bit with gradients go through ``packed_attention``: the backward
      pass of torch's kernel is slow there.

    An accelerated model uses it if its attention is "auto"; its name is
    ``"sphinxkit.acceleration:BlockedAttention"``.
    """

    name = "cpu_blocked"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, state: Any) -> Tensor:
        """See ``AttentionBackend.attend``. Shape: as there."""
        is_traced = torch.compiler.is_compiling()
        is_whole = pattern.write is None and pattern.window is None
        if not is_whole or q.dtype not in HALF_DTYPES or q.device.type != "cpu" or is_traced:
            return super().attend(q, k, v, pattern, state)
        heads, length = q.shape[1:3]
        wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        if pattern.seq_lens is not None:
            if wants_gradient and max(pattern.seq_lens) <= MAX_LENGTH:
                return packed_attention(q, repeat_heads(k, heads), repeat_heads(v, heads), pattern.seq_lens)
        elif not wants_gradient and length in BLOCKED_LENGTHS and q.dtype == torch.bfloat16 and _has_no_tiles():
            return causal_attention(q, repeat_heads(k, heads), repeat_heads(v, heads))
        return super().attend(q, k, v, pattern, state)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """Causal attention within each of the packed samples.

    Scores and softmax are float32, the weights are rounded to the inputs' dtype and kept for the backward pass, whose
    products are in that dtype. torch's CPU kernel computes the weights again, in small tiles; at samples of 30 to 430
    tokens, 8 heads of 32 channels, bfloat16, it takes 2 to 3 times as long for both passes (the backward pass 3 to 5),
    and its gradients are no closer to those in float64.

    Args:
        q: Queries, in 16 bit.
        k: Keys, as many heads.
        v: Values.
        lengths: Of the samples; they sum to S.
    Shape:
        q, k, v: (1, H, S, D)
        return: (1, H, S, D), in the memory order (1, S, H, D)
    """
    out: Tensor = _PackedAttention.apply(q, k, v, tuple(lengths))
    return out


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over long rows, in blocks of queries; no gradient is recorded.

    Scores and softmax are float32, the weights are rounded to the inputs' dtype for their product with the values: as
    exact as torch's CPU kernel (2.3e-3 and 2.0e-3 beside float64 in bfloat16). That kernel multiplies small tiles; at
    1519 tokens of 16 heads of 64 channels in bfloat16 it takes 1.1 or 1.4 times as long (two machines).

    Args:
        q: Queries, in 16 bit.
        k: Keys, as many heads.
        v: Values.
    Shape:
        q, k, v: (B, H, S, D)
        return: (B, H, S, D), in the memory order (B, S, H, D)
    """
    batch, heads, length, channels = q.shape
    rows = max(1, _SCORES * torch.get_num_threads() // length)
    block = min(_LONG_BLOCK, max(1, rows // 2), length)  # of two heads at least: 8 % faster than of one
    together = min(heads, max(1, rows // block))
    mask = torch.full((block, block), -torch.inf, dtype=torch.float32, device=q.device).triu_(1)
    size = together * block * length
    scores, softmax = (torch.empty(size, dtype=torch.float32, device=q.device) for _ in range(2))
    rounded = q.new_empty(size)
    out = _like(q)
    for row in range(batch):
        for first in range(0, heads, together):
            group = slice(first, first + together)
            queries, keys = q[row, group].float().mul_(channels**-0.5), k[row, group].float().transpose(1, 2)
            values = v[row, group].contiguous()
            for start in range(0, length, block):
                stop = min(length, start + block)
                soft = _softmax(queries, keys, start, stop, mask, scores, softmax)
                weights = rounded[: soft.numel()].view(soft.shape).copy_(soft)
                out[row, group, start:stop] = torch.bmm(weights, values[:, :stop])
    return out


def _softmax(
    queries: Tensor, keys: Tensor, start: int, stop: int, mask: Tensor, scores: Tensor, softmax: Tensor
) -> Tensor:
    """What queries ``start`` to ``stop`` give to the keys before ``stop``, (H, stop - start, stop), in ``softmax``.

    Queries (H, S, D) are scaled, keys are (H, D, S), both float32; the flat ``scores`` is scratch.
    """
    shape = (len(queries), stop - start, stop)
    block, soft = (scratch[: math.prod(shape)].view(shape) for scratch in (scores, softmax))
    torch.bmm(queries[:, start:stop], keys[:, :, :stop], out=block)
    block[:, :, start:] += mask[: stop - start, : stop - start]
    torch._softmax(block, -1, False, out=soft)
    return soft


def _like(x: Tensor) -> Tensor:
    """Empty (B, H, S, D) in the memory order (B, S, H, D)."""
    batch, heads, width, channels = x.shape
    return x.new_empty(batch, width, heads, channels).transpose(1, 2)


def _weights(q: Tensor, k: Tensor, mask: Tensor, scores: Tensor, softmax: Tensor) -> Tensor:
    """Attention weights (H, n, n) of one sample, in the dtype of ``q``; ``scores`` and ``softmax`` are scratch."""
    heads, length, channels = q.shape
    weights = q.new_empty(heads, length, length)
    queries, keys = q.float() * channels**-0.5, k.float().transpose(1, 2)
    for start in range(0, length, _BLOCK):
        stop = min(length, start + _BLOCK)
        weights[:, start:stop, :stop] = _softmax(queries, keys, start, stop, mask, scores, softmax)
        weights[:, start:stop, stop:] = 0
    return weights


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Shape: q, k, v, return: (1, H, N, D)."""
        out = _like(q)
        rows = min(max(lengths), _BLOCK)
        mask = torch.full((rows, rows), -torch.inf, dtype=torch.float32, device=q.device).triu_(1)
        scratch = [
            torch.empty(q.shape[1] * rows * max(lengths), dtype=torch.float32, device=q.device) for _ in range(2)
        ]
        kept, start = [], 0
        for length in lengths:
            queries, keys, values = (x[0, :, start : start + length] for x in (q, k, v))
            kept.append(_weights(queries, keys, mask, *scratch))
            out[0, :, start : start + length] = kept[-1] @ values
            start += length
        ctx.save_for_backward(q, k, v, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Shape: grad, and each of return: (1, H, N, D)."""
        q, k, v, *kept = ctx.saved_tensors
        found = [_like(x) for x in (q, k, v)]
        scale = q.shape[-1] ** -0.5
        size = max(weights.numel() for weights in kept)
        scratch = [q.new_empty(size) for _ in range(2)]
        start = 0
        for weights in kept:
            span = slice(start, start + weights.shape[1])
            start = span.stop
            queries, keys, values, outer = (x[0, :, span] for x in (q, k, v, grad))
            of_weights, of_scores = (memory[: weights.numel()].view(weights.shape) for memory in scratch)
            torch.bmm(outer, values.transpose(1, 2), out=of_weights)
            torch._softmax_backward_data(of_weights, weights, -1, weights.dtype, grad_input=of_scores)
            found[0][0, :, span] = (of_scores @ keys) * scale
            found[1][0, :, span] = (of_scores.transpose(1, 2) @ queries) * scale
            found[2][0, :, span] = weights.transpose(1, 2) @ outer
        return found[0], found[1], found[2], None


@functools.cache
def _has_no_tiles() -> bool:
    """Whether the CPU has bfloat16 instructions but no matrix tiles, for which torch's kernel is made."""
    features = getattr(torch.cpu, "get_capabilities", dict[str, bool])()  # older torch has none
    return bool(features.get("avx512_bf16")) and not features.get("amx_bf16")
