"""Triton kernels of the decoder layers for inference on CUDA: what stands between products, and quantised products.

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
# Of a quantised matrix: what a program reads in one go, bytes of how many rows; our choice.
BLOCK_BYTES, OUTPUTS = 512, 8
MAX_ROWS = 32  # that quantized_linear is made for: more are cheaper with the matrix expanded in memory


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


def rotate_and_store(qkv: Tensor, rotations: Tensor, starts: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Rotate the queries and keys of one token a row; keys and values go to the cache, in its dtype.

    Args:
        qkv: Projected queries, keys and values, contiguous.
        rotations: From ``rope_rotations``.
        starts: The slot of each row's token.
        keys: Of a layer's cache, its last axis contiguous.
        values: Likewise, laid out as ``keys``.
    Shape:
        qkv: (B, 1, H + 2 Hkv, D)
        rotations: (B, 1, 1, D/2) complex64
        starts: (B,) int64
        keys, values: (B, Hkv, slots, D)
        return: rotated queries, (B, 1, H, D), in the dtype of ``qkv``
    """
    rows, _, heads, head_dim = qkv.shape
    groups = keys.shape[1]
    queries = qkv.new_empty(rows, 1, heads - 2 * groups, head_dim)
    _rotate_and_store[(rows, heads)](
        qkv,
        torch.view_as_real(rotations),
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


def quantized_linear(x: Tensor, codes: Tensor, scales: Tensor, bits: int, group_size: int) -> Tensor:
    """A few rows times a quantised matrix that is expanded on its way, never in memory.

    Args:
        x: Rows, contiguous.
        codes: 8 bits: int8; 4 bits: two to a byte, the even column's in the lower half.
        scales: 8 bits: of each row; 4 bits: a scale and a zero of each group, ``w = (code - 8) * scale + zero``.
        bits: 8 or 4.
        group_size: Columns of a group, with 4 bits.
    Shape:
        x: (M, I), M at most ``MAX_ROWS``
        codes: (O, I) or (O, I/2)
        scales: (O,) or (O, I / group_size, 2)
        return: (M, O), in the dtype of ``x``
    """
    rows, width = x.shape
    outputs = len(codes)
    out = x.new_empty(rows, outputs)
    per_byte = 8 // bits
    group_bytes = group_size // per_byte if bits == 4 else 64
    groups = triton.next_power_of_2(max(1, BLOCK_BYTES // group_bytes))
    arguments = (x, codes, scales, out, outputs, width // per_byte)
    if rows == 1:
        _quantized_row[(triton.cdiv(outputs, OUTPUTS),)](
            *arguments, bits=bits, group_bytes=group_bytes, groups=groups, block_outputs=OUTPUTS
        )
    else:
        _quantized_rows[(triton.cdiv(outputs, 16),)](
            *arguments,
            rows,
            bits=bits,
            group_bytes=group_bytes,
            groups=max(1, groups // 4),
            block_outputs=16,
            block_rows=max(16, triton.next_power_of_2(rows)),
        )
    return out


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
    rotations,
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
        cos = tl.load(rotations + 2 * (row * half + pairs), mask=inside, other=0.0)
        sin = tl.load(rotations + 2 * (row * half + pairs) + 1, mask=inside, other=0.0)
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


@triton.jit
def _quantized_row(
    x,
    codes,
    scales,
    out,
    num_outputs,
    width,
    bits: tl.constexpr,
    group_bytes: tl.constexpr,
    groups: tl.constexpr,
    block_outputs: tl.constexpr,
):
    outputs = tl.program_id(0) * block_outputs + tl.arange(0, block_outputs)
    real = outputs < num_outputs
    num_groups = tl.cdiv(width, group_bytes)
    total = tl.zeros((block_outputs, groups), tl.float32)
    for start in range(0, num_groups, groups):
        group = start + tl.arange(0, groups)
        column = group[:, None] * group_bytes + tl.arange(0, group_bytes)[None, :]
        inside = column < width
        place = outputs.to(tl.int64)[:, None, None] * width + column[None, :, :]
        code = tl.load(codes + place, mask=real[:, None, None] & inside[None, :, :], other=0)
        if bits == 8:
            given = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(code.to(tl.float32) * given[None, :, :], axis=2)
        else:
            even = tl.load(x + 2 * column, mask=inside, other=0.0).to(tl.float32)
            odd = tl.load(x + 2 * column + 1, mask=inside, other=0.0).to(tl.float32)
            low, high = (code & 15).to(tl.float32), (code >> 4).to(tl.float32)
            products = tl.sum(low * even[None, :, :] + high * odd[None, :, :], axis=2)
            sums = tl.sum(even + odd, axis=1)
            pair = scales + 2 * (outputs.to(tl.int64)[:, None] * num_groups + group[None, :])
            known = real[:, None] & (group < num_groups)[None, :]
            scale = tl.load(pair, mask=known, other=0.0).to(tl.float32)
            zero = tl.load(pair + 1, mask=known, other=0.0).to(tl.float32)
            total += products * scale + (zero - 8 * scale) * sums[None, :]
    result = tl.sum(total, axis=1)
    if bits == 8:
        result = result * tl.load(scales + outputs, mask=real, other=0.0).to(tl.float32)
    tl.store(out + outputs, result.to(out.dtype.element_ty), mask=real)


@triton.jit
def _quantized_rows(
    x,
    codes,
    scales,
    out,
    num_outputs,
    width,
    num_rows,
    bits: tl.constexpr,
    group_bytes: tl.constexpr,
    groups: tl.constexpr,
    block_outputs: tl.constexpr,
    block_rows: tl.constexpr,
):
    outputs = tl.program_id(0) * block_outputs + tl.arange(0, block_outputs)
    rows = tl.arange(0, block_rows)
    real, given = outputs < num_outputs, rows < num_rows
    num_groups = tl.cdiv(width, group_bytes)
    dtype = x.dtype.element_ty
    total = tl.zeros((block_rows, block_outputs), tl.float32)
    for start in range(0, num_groups, groups):
        column = start * group_bytes + tl.arange(0, groups * group_bytes)
        inside = column < width
        place = outputs.to(tl.int64)[:, None] * width + column[None, :]
        code = tl.load(codes + place, mask=real[:, None] & inside[None, :], other=0)
        known = given[:, None] & inside[None, :]
        if bits == 8:
            row = tl.load(x + rows[:, None] * width + column[None, :], mask=known, other=0.0)
            total += tl.dot(row, tl.trans(code.to(dtype)), input_precision="ieee")
        else:
            source = x + rows[:, None] * 2 * width + 2 * column[None, :]
            even = tl.load(source, mask=known, other=0.0)
            odd = tl.load(source + 1, mask=known, other=0.0)
            pair = scales + 2 * (outputs.to(tl.int64)[:, None] * num_groups + (column // group_bytes)[None, :])
            scale = tl.load(pair, mask=real[:, None] & inside[None, :], other=0.0).to(tl.float32)
            zero = tl.load(pair + 1, mask=real[:, None] & inside[None, :], other=0.0).to(tl.float32)
            low = ((code & 15).to(tl.float32) - 8) * scale + zero
            high = ((code >> 4).to(tl.float32) - 8) * scale + zero
            total += tl.dot(even, tl.trans(low.to(dtype)), input_precision="ieee")
            total += tl.dot(odd, tl.trans(high.to(dtype)), input_precision="ieee")
    if bits == 8:
        total = total * tl.load(scales + outputs, mask=real, other=0.0).to(tl.float32)[None, :]
    place = rows[:, None] * num_outputs + outputs[None, :]
    tl.store(out + place, total.to(dtype), mask=given[:, None] & real[None, :])
