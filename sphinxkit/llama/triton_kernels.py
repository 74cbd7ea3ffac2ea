"""Triton kernels of the decoder layers for inference on CUDA: what stands between the products.

Each rounds where the operators that it stands for round, so results agree with theirs up to the order of a sum. A
decoding step is bound by the bytes of the weights; the small operations add little arithmetic, but a launch each.

Importing this module imports Triton, which comes with torch for CUDA on Linux; ``fused`` asks for it only there.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_COLUMNS = 1024  # of a row that one program of silu_mul takes; our choice


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x + delta``, and its RMS norm times ``weight``.

    Args:
        x: Tokens, contiguous.
        delta: What a layer adds to them, contiguous; None: nothing, and the first result is ``x`` itself.
        weight: Scale of each channel.
        eps: Added to the mean square.
    Shape:
        x, delta: (..., D)
        weight: (D,)
        return: two of (..., D)
    """
    width = x.shape[-1]
    total = x if delta is None else torch.empty_like(x)
    normed = torch.empty_like(x)
    block = triton.next_power_of_2(width)
    _add_rms_norm[(x.numel() // width,)](
        x,
        x if delta is None else delta,
        weight,
        total,
        normed,
        width,
        eps,
        adds=delta is not None,
        block=block,
        num_warps=min(16, max(4, block // 512)),
    )
    return total, normed


def silu_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of the two halves of the last axis.

    Args:
        gate_up: Contiguous.
    Shape:
        gate_up: (..., 2 F)
        return: (..., F)
    """
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    _silu_mul[(out.numel() // width, triton.cdiv(width, BLOCK_COLUMNS))](gate_up, out, width, block=BLOCK_COLUMNS)
    return out


def rotate_and_store(qkv: Tensor, freqs_cis: Tensor, starts: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Rotate the queries and keys of one token a row; keys and values go to the cache, in its dtype.

    Args:
        qkv: Projected queries, keys and values, contiguous.
        freqs_cis: From ``precompute_freqs_cis``.
        starts: The slot of each row's token.
        keys: Of a layer's cache, its last axis contiguous.
        values: Likewise, laid out as ``keys``.
    Shape:
        qkv: (B, 1, H + 2 Hkv, D)
        freqs_cis: (B, 1, 1, D/2) complex64
        starts: (B,) int64
        keys, values: (B, Hkv, slots, D)
        return: rotated queries, (B, 1, H, D), in the dtype of ``qkv``
    """
    rows, _, heads, head_dim = qkv.shape
    groups = keys.shape[1]
    queries = qkv.new_empty(rows, 1, heads - 2 * groups, head_dim)
    _rotate_and_store[(rows, heads)](
        qkv,
        torch.view_as_real(freqs_cis),
        starts,
        queries,
        keys,
        values,
        *keys.stride()[:3],
        num_heads=heads - 2 * groups,
        num_kv_heads=groups,
        half=head_dim // 2,
        block=triton.next_power_of_2(head_dim // 2),
        num_warps=1,
    )
    return queries


@triton.jit
def _add_rms_norm(x, delta, weight, total, normed, width, eps, adds: tl.constexpr, block: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, block)
    inside = columns < width
    row = tl.load(x + start + columns, mask=inside, other=0.0)
    dtype = row.dtype
    if adds:
        added = row.to(tl.float32) + tl.load(delta + start + columns, mask=inside, other=0.0).to(tl.float32)
        row = added.to(dtype)
        tl.store(total + start + columns, row, mask=inside)
    wide = row.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
    scaled = (wide * scale).to(dtype).to(tl.float32)
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + start + columns, (scaled * factor).to(dtype), mask=inside)


@triton.jit
def _silu_mul(gate_up, out, width, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    gate = tl.load(gate_up + 2 * row * width + columns, mask=inside, other=0.0)
    up = tl.load(gate_up + 2 * row * width + width + columns, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    gated = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(out + row * width + columns, (gated * up.to(tl.float32)).to(gate.dtype), mask=inside)


@triton.jit
def _rotate_and_store(
    qkv,
    freqs_cis,
    starts,
    queries,
    keys,
    values,
    row_stride,
    head_stride,
    slot_stride,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    half: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    pairs = tl.arange(0, block)
    inside = pairs < half
    source = qkv + (row * (num_heads + 2 * num_kv_heads) + head) * 2 * half
    even = tl.load(source + 2 * pairs, mask=inside, other=0.0)
    odd = tl.load(source + 2 * pairs + 1, mask=inside, other=0.0)
    slot = tl.load(starts + row)
    if head < num_heads + num_kv_heads:
        x, y = even.to(tl.float32), odd.to(tl.float32)
        cos = tl.load(freqs_cis + 2 * (row * half + pairs), mask=inside, other=0.0)
        sin = tl.load(freqs_cis + 2 * (row * half + pairs) + 1, mask=inside, other=0.0)
        even = (x * cos - y * sin).to(even.dtype)
        odd = (x * sin + y * cos).to(odd.dtype)
    if head < num_heads:
        target = queries + (row * num_heads + head) * 2 * half
        tl.store(target + 2 * pairs, even, mask=inside)
        tl.store(target + 2 * pairs + 1, odd, mask=inside)
    elif head < num_heads + num_kv_heads:
        place = row * row_stride + (head - num_heads) * head_stride + slot * slot_stride
        tl.store(keys + place + 2 * pairs, even.to(keys.dtype.element_ty), mask=inside)
        tl.store(keys + place + 2 * pairs + 1, odd.to(keys.dtype.element_ty), mask=inside)
    else:
        place = row * row_stride + (head - num_heads - num_kv_heads) * head_stride + slot * slot_stride
        tl.store(values + place + 2 * pairs, even.to(values.dtype.element_ty), mask=inside)
        tl.store(values + place + 2 * pairs + 1, odd.to(values.dtype.element_ty), mask=inside)
