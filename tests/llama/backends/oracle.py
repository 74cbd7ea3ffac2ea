from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sphinxkit.llama import AttentionBackend, AttentionPattern, KVCache, backends

FP32_TOLERANCE = 3e-6  # float32 sums of at most a few dozen products of numbers of order 1


HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16


class StandIn:
    """xformers.ops.fmha with its own bias objects and attention by loops, as the CUDA kernels read their arguments."""

    def __init__(self) -> None:
        self.attn_bias = pytest.importorskip("xformers.ops.fmha.attn_bias")
        self.flash = SimpleNamespace(FwOp="flash forward")
        self.shapes: list[tuple[int, ...]] = []

    def memory_efficient_attention(
        self, q: Tensor, k: Tensor, v: Tensor, attn_bias: Any = None, op: Any = None
    ) -> Tensor:
        masks = self.attn_bias
        self.shapes.append(tuple(k.shape))
        assert q.shape[2:] == k.shape[2:] == v.shape[2:]
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        if any(x.requires_grad for x in (q, k, v)):
            assert q.ndim == 4  # grouped inputs have no backward pass
        mask = torch.zeros(q.shape[1], k.shape[1], dtype=torch.bool)
        if type(attn_bias) is masks.LowerTriangularMask:
            assert q.shape[1] == k.shape[1]
            mask = torch.ones_like(mask).tril()
        elif type(attn_bias) is masks.BlockDiagonalCausalMask:
            for start, end in zip(attn_bias.q_seqinfo.seqstart_py, attn_bias.q_seqinfo.seqstart_py[1:], strict=False):
                mask[start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()
            assert attn_bias.q_seqinfo is attn_bias.k_seqinfo
        else:
            assert type(attn_bias) is masks.BlockDiagonalCausalWithOffsetPaddedKeysMask
            assert op == ("flash forward", None)
            starts = attn_bias.q_seqinfo.seqstart.tolist()
            keys, used = attn_bias.k_seqinfo.seqstart.tolist(), attn_bias.k_seqinfo.seqlen.tolist()
            assert attn_bias.k_seqinfo.seqlen.dtype == torch.int32
            assert starts[-1] == q.shape[1]
            assert keys[-1] == k.shape[1]
            assert max(used) <= attn_bias.k_seqinfo.max_seqlen <= attn_bias.k_seqinfo.padding
            for row, length in enumerate(used):
                count = starts[row + 1] - starts[row]
                assert count <= attn_bias.q_seqinfo.max_seqlen
                for index in range(count):  # aligned at the bottom right
                    mask[starts[row] + index, keys[row] : keys[row] + length - count + index + 1] = True
        scores = torch.einsum("bq...d,bk...d->b...qk", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("b...qk,bk...d->bq...d", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


def make(name: str) -> AttentionBackend:
    return backends.XFormersAttention(StandIn()) if name == "stand-in" else backends.registry.build(name)


@dataclass
class Case:
    """Queries, keys and values, and for each row and query the (row, index) of the keys that it sees."""

    pattern: AttentionPattern
    q: Tensor
    k: Tensor
    v: Tensor
    real: list[tuple[int, int, Tensor, Tensor]]  # row, query, its keys (T, Hkv, D), its values

    def check(self, backend: AttentionBackend, tolerance: float) -> None:
        out = backend.attend(self.q, self.k, self.v, self.pattern, backend.prepare(self.pattern, self.q.dtype))
        assert out.shape == self.q.shape
        assert out.dtype == self.q.dtype
        assert out.isfinite().all()
        for row, query, keys, values in self.real:
            for head in range(self.q.shape[1]):
                shared = head * keys.shape[1] // self.q.shape[1]
                scores = keys[:, shared].double() @ self.q[row, head, query].double() / self.q.shape[-1] ** 0.5
                weights = torch.exp(scores - scores.max())
                exact = (weights / weights.sum()) @ values[:, shared].double()
                torch.testing.assert_close(out[row, head, query].double(), exact, atol=tolerance, rtol=0)


def draw(
    batch: int, width: int, heads: int, *, seed: int, dtype: torch.dtype, device: str, dim: int = HEAD_DIM
) -> Tensor:
    numbers = torch.randn(batch, width, heads, dim, generator=torch.Generator().manual_seed(seed))
    return numbers.to(device, dtype)


def fresh_case(
    lens: list[int] | None,
    *,
    batch: int = 2,
    width: int = 7,
    kv_heads: int = KV_HEADS,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Case:
    """Causal rows, or one packed row."""
    if lens is not None:
        batch, width = 1, sum(lens)
    q, k, v = (
        draw(batch, width, heads, seed=seed, dtype=dtype, device=device)
        for seed, heads in enumerate((HEADS, kv_heads, kv_heads))
    )
    real = []
    for row in range(batch):
        begin = 0
        for length in lens or [width]:
            real += [(row, i, k[row, begin : i + 1], v[row, begin : i + 1]) for i in range(begin, begin + length)]
            begin += length
    pattern = AttentionPattern(batch, width, q.device, seq_lens=None if lens is None else tuple(lens))
    return Case(pattern, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), real)


def cached_case(
    held: list[int],
    counts: list[int],
    *,
    give_counts: bool = True,
    static: bool = True,
    kv_heads: int = KV_HEADS,
    capacity: int = 13,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Case:
    """Rows that hold some tokens take some more."""
    batch, width = len(held), max(counts)
    cache = KVCache(1, batch, capacity, kv_heads, HEAD_DIM, device=device, dtype=dtype, static_shapes=static)
    told: list[tuple[Tensor, Tensor]] = []
    for seed, numbers in ((10, held), (20, counts)):
        k, v = (draw(batch, max(numbers), kv_heads, seed=seed + i, dtype=dtype, device=device) for i in range(2))
        if not any(numbers):
            told.append((k, v))
            continue
        step = cache.prepare_write(max(numbers), numbers if give_counts or seed == 10 else None)
        cache.write(0, k, v, step)
        told.append((k, v))
        if seed == 10:
            cache.advance(step)
    q = draw(batch, width, HEADS, seed=0, dtype=dtype, device=device)
    (old_k, old_v), (new_k, new_v) = told
    real = []
    for row in range(batch):
        for index in range(counts[row]):
            keys, values = (
                torch.cat([old[row, : held[row]], new[row, : index + 1]])
                for old, new in ((old_k, new_k), (old_v, new_v))
            )
            real.append((row, index, keys, values))
    pattern = AttentionPattern(batch, width, q.device, write=step)
    return Case(pattern, q.transpose(1, 2), *cache.read(0, step), real)
