"""Triton kernels of products with weights of 8 or 4 bits on CUDA.

Codes come in words of 32 bits, as ``kernels.pack_codes`` makes them. At the memory's rate there is time for 6 to 9
instructions a byte (H200 and H100: 132 processors that begin 128 a cycle, at 1.8 GHz, for 4.8 and 3.35 TB/s), and
integers become floats at an eighth of the rate of other instructions. So a code is masked in its place, wherever that
is, into the mantissa of a power of two, which one multiplication and subtraction, both exact, make
``code - 2^(bits - 1)``. A row times 4 bits comes to 8.5 instructions a byte so, 8 bits to 4.4, and with a norm fused
into it to 9.5 and 5.0 (``python -m benchmarks kernels``).

Importing this module imports Triton; see ``triton_kernels``.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sphinxkit.llama.kernels import PLAIN, RowFusion
from sphinxkit.llama.triton_rows import fusion_arguments, new_output, rows_of_program, store_outputs

MAX_ROWS = 32  # that quantized_linear is made for: more are cheaper with the matrix expanded in memory
# The bits of the float 2^23: below it stands an integer of 23 bits. The kernels get it as an argument, since a mask and
# a bit pattern that are both constants take two instructions, and with one of them in a register one.
_MAGIC = 0x4B000000
# What a program of one warp reads in one go: 4 words a thread, of so many outputs. Our choice, by the instructions and
# registers of the compiled kernel: more outputs share more of the work on x, fewer make more programs.
_CHUNKS, _OUTPUTS, _FEW_OUTPUTS = 32, 8, 4
MANY_OUTPUTS = 8192  # from which on programs of one warp fill a device; our choice
# For several rows: outputs of a program (what a tensor core's product takes), words that it reads of each in one go,
# programs that fill a device, about 8 for each processor of an H100, and parts into which the columns are shared out
# where there are fewer. Our choice.
_TILE, _BLOCK_WORDS, _PROGRAMS, _MAX_SHARES = 16, 32, 1024, 8


def quantized_linear(x: Tensor, codes: Tensor, scales: Tensor, bits: int, group_size: int) -> Tensor:
    """A few rows times a quantised matrix that is expanded on its way, never in memory.

    Args:
        x: Rows, contiguous.
        codes: From ``pack_codes``.
        scales: 8 bits: of each output, ``w = (code - 128) * scale``; 4 bits: a scale and a zero of each group,
            ``w = (code - 8) * scale + zero``.
        bits: 8 or 4.
        group_size: Columns of a group, with 4 bits.
    Shape:
        x: (M, I), M at most ``MAX_ROWS``
        codes: (O, I * bits / 32) int32
        scales: (O,) or (O, I / group_size, 2)
        return: (M, O), in the dtype of ``x``
    """
    if len(x) == 1:
        return quantized_row(x, codes, scales, bits, group_size)
    rows, width = x.shape
    outputs = len(codes)
    programs = triton.cdiv(outputs, _TILE)
    shares = min(_MAX_SHARES, triton.cdiv(_PROGRAMS, programs), triton.cdiv(codes.shape[1], _BLOCK_WORDS))
    parts = x.new_empty(shares, rows, outputs, dtype=x.dtype if shares == 1 else torch.float32)
    _quantized_rows[(programs, shares)](
        x,
        codes,
        scales,
        parts,
        outputs,
        width,
        _MAGIC,
        rows,
        bits=bits,
        group_chunks=_group_chunks(bits, group_size),
        block=_BLOCK_WORDS,
        each=_TILE,
        block_rows=max(16, triton.next_power_of_2(rows)),
        num_warps=1,
    )
    return parts[0] if shares == 1 else parts.sum(0).to(x.dtype)


def quantized_row(
    x: Tensor, codes: Tensor, scales: Tensor, bits: int, group_size: int, fusion: RowFusion = PLAIN
) -> Tensor:
    """One row times a quantised matrix, with what is fused into it: ``triton_rows.linear_row``.

    Args:
        x: A single row, contiguous.
        codes: As ``quantized_linear`` takes them.
        scales: Likewise.
        bits: 8 or 4.
        group_size: Columns of a group, with 4 bits.
        fusion: What is done besides.
    Shape:
        x: (..., I) with one row
        codes: (O, I * bits / 32) int32
        scales: (O,) or (O, I / group_size, 2)
        return: (..., O), or (..., O/2) if gated
    """
    outputs = len(codes)
    out = new_output(x, outputs, fusion)
    each, warps = (_OUTPUTS, 1) if outputs >= MANY_OUTPUTS else (_FEW_OUTPUTS, 2)
    _quantized_row[(triton.cdiv(outputs, each),)](
        x,
        codes,
        scales,
        out,
        num_outputs=outputs,
        width=x.shape[-1],
        magic=_MAGIC,
        **fusion_arguments(x, fusion),
        bits=bits,
        group_chunks=_group_chunks(bits, group_size),
        block=_CHUNKS * warps,
        each=each,
        num_warps=warps,
    )
    return out


def expand(codes: Tensor, scales: Tensor, bits: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """The weight that codes stand for: ``kernels.expand_codes`` in one pass.

    Args:
        codes: As ``quantized_linear`` takes them, and so all else.
        scales: See there.
        bits: 8 or 4.
        group_size: Columns of a group, with 4 bits.
        dtype: Of the weight.
    Shape:
        codes: (O, I * bits / 32) int32
        scales: (O,) or (O, I / group_size, 2)
        return: (O, I)
    """
    outputs, words = codes.shape
    out = scales.new_empty(outputs, words * 32 // bits, dtype=dtype)
    block, each = 32, 4
    _expand[(triton.cdiv(outputs, each), triton.cdiv(words // 4, block))](
        codes,
        scales,
        out,
        outputs,
        out.shape[1],
        _MAGIC,
        bits=bits,
        group_chunks=_group_chunks(bits, group_size),
        block=block,
        each=each,
        num_warps=1,
    )
    return out


def _group_chunks(bits: int, group_size: int) -> int:
    """Chunks of 4 words that share a scale; 0: all of a row do."""
    return group_size * bits // 128 if bits == 4 else 0


@triton.jit
def _unpack(word, magic, bits: tl.constexpr, index: tl.constexpr):
    """Codes of that index in each word, less half of their range, as floats."""
    last: tl.constexpr = 23 // bits * bits - bits  # the highest place where a code fits into 23 bits
    shift: tl.constexpr = 32 - bits - last
    place: tl.constexpr = bits * index if bits * index <= last else bits * index - shift
    if bits * index > last:
        word = word >> shift
    wide = (word & (((1 << bits) - 1) << place) | magic).to(tl.float32, bitcast=True)
    return wide * (1.0 / (1 << place)) - (8388608.0 / (1 << place) + (1 << (bits - 1)))


@triton.jit
def _quantized_row(
    x,
    codes,
    scales,
    out,
    norm,
    residual,
    num_outputs,
    width,
    eps,
    magic,
    bits: tl.constexpr,
    group_chunks: tl.constexpr,
    normed: tl.constexpr,
    adds: tl.constexpr,
    gated: tl.constexpr,
    block: tl.constexpr,
    each: tl.constexpr,
):
    per_word: tl.constexpr = 32 // bits
    outputs, there = rows_of_program(num_outputs, each, gated)
    own, real = outputs.to(tl.int64)[:, None, None], there[:, None, None]
    chunks = width // (4 * per_word)
    lane = tl.arange(0, 4)[None, None, :]
    # (outputs, chunks, 4 words of a chunk) in all that follows: every thread has whole chunks, and nothing of one
    # thread goes to another before the last sum
    total = tl.zeros((each, block, 1), tl.float32)
    squares = tl.zeros((1, block, 4), tl.float32)
    for start in range(0, chunks, block):
        chunk = (start + tl.arange(0, block))[None, :, None]
        inside = chunk < chunks
        word = tl.load(codes + own * (4 * chunks) + (4 * chunk + lane), mask=real & inside, other=0)
        found = tl.zeros((each, block, 4), tl.float32)
        sums = tl.zeros((1, block, 4), tl.float32)
        for index in tl.static_range(per_word):
            column = 4 * per_word * chunk + 4 * index + lane
            given = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
            if normed:
                squares += given * given
                given *= tl.load(norm + column, mask=inside, other=0.0).to(tl.float32)
            found += _unpack(word, magic, bits, index) * given
            sums += given
        product = tl.sum(found, axis=2, keep_dims=True)
        if group_chunks > 0:
            pair = scales + 2 * (own * (chunks // group_chunks) + chunk // group_chunks)
            scale = tl.load(pair, mask=real & inside, other=0.0).to(tl.float32)
            zero = tl.load(pair + 1, mask=real & inside, other=0.0).to(tl.float32)
            product = product * scale + zero * tl.sum(sums, axis=2, keep_dims=True)
        total += product
    result = tl.sum(tl.sum(total, axis=2), axis=1)
    if group_chunks == 0:
        result = result * tl.load(scales + outputs, mask=there, other=0.0).to(tl.float32)
    square = tl.sum(tl.sum(tl.sum(squares, axis=2), axis=1), axis=0)
    store_outputs(result, square, out, residual, num_outputs, width, eps, normed, adds, gated, each)


@triton.jit
def _quantized_rows(
    x,
    codes,
    scales,
    parts,
    num_outputs,
    width,
    magic,
    num_rows,
    bits: tl.constexpr,
    group_chunks: tl.constexpr,
    block: tl.constexpr,
    each: tl.constexpr,
    block_rows: tl.constexpr,
):
    per_word: tl.constexpr = 32 // bits
    outputs, row = tl.program_id(0) * each + tl.arange(0, each), tl.arange(0, block_rows)
    there, given = outputs < num_outputs, (row < num_rows)[:, None]
    own, real = outputs.to(tl.int64)[:, None], there[:, None]
    chunks = width // (4 * per_word)
    dtype = x.dtype.element_ty
    size = tl.cdiv(tl.cdiv(4 * chunks, block), tl.num_programs(1)) * block
    begin = tl.program_id(1) * size
    total = tl.zeros((block_rows, each), tl.float32)
    for start in range(begin, tl.minimum(begin + size, 4 * chunks), block):
        place = (start + tl.arange(0, block))[None, :]
        inside = place < 4 * chunks
        word = tl.load(codes + own * (4 * chunks) + place, mask=real & inside, other=0)
        if group_chunks > 0:
            pair = scales + 2 * (own * (chunks // group_chunks) + place // (4 * group_chunks))
            scale = tl.load(pair, mask=real & inside, other=0.0).to(tl.float32)
            zero = tl.load(pair + 1, mask=real & inside, other=0.0).to(tl.float32)
        column = place // 4 * (4 * per_word) + place % 4
        for index in tl.static_range(per_word):
            part = tl.load(x + row[:, None] * width + (column + 4 * index), mask=given & inside, other=0.0)
            weight = _unpack(word, magic, bits, index)
            if group_chunks > 0:
                weight = weight * scale + zero
            total += tl.dot(part, tl.trans(weight.to(dtype)), input_precision="ieee")
    if group_chunks == 0:
        total = total * tl.load(scales + outputs, mask=there, other=0.0).to(tl.float32)[None, :]
    target = parts + (tl.program_id(1) * num_rows + row[:, None]) * num_outputs + outputs[None, :]
    tl.store(target, total.to(parts.dtype.element_ty), mask=given & there[None, :])


@triton.jit
def _expand(
    codes,
    scales,
    out,
    num_outputs,
    width,
    magic,
    bits: tl.constexpr,
    group_chunks: tl.constexpr,
    block: tl.constexpr,
    each: tl.constexpr,
):
    per_word: tl.constexpr = 32 // bits
    outputs = tl.program_id(0) * each + tl.arange(0, each)
    chunk = (tl.program_id(1) * block + tl.arange(0, block))[None, :, None]
    chunks = width // (4 * per_word)
    own, lane = outputs.to(tl.int64)[:, None, None], tl.arange(0, 4)[None, None, :]
    inside = (outputs < num_outputs)[:, None, None] & (chunk < chunks)
    word = tl.load(codes + own * (4 * chunks) + (4 * chunk + lane), mask=inside, other=0)
    if group_chunks > 0:
        pair = scales + 2 * (own * (chunks // group_chunks) + chunk // group_chunks)
        scale = tl.load(pair, mask=inside, other=0.0).to(tl.float32)
        zero = tl.load(pair + 1, mask=inside, other=0.0).to(tl.float32)
    else:
        scale = tl.load(scales + own, mask=inside, other=0.0).to(tl.float32)
        zero = 0.0
    for index in tl.static_range(per_word):
        weight = _unpack(word, magic, bits, index) * scale + zero
        column = 4 * per_word * chunk + 4 * index + lane
        tl.store(out + own * width + column, weight.to(out.dtype.element_ty), mask=inside)
