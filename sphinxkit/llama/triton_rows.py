"""Triton kernels of one row times a matrix on CUDA, with what stands before and behind the product in a decoder layer.

Decoding one row reads every weight once and computes little. A matrix product made for tensor cores is not what that
needs, and each small kernel between the products leaves the memory idle for some microseconds; a product of LLaMA 13B
takes 12 to 70 by its bytes at 4 TB/s. So a product here also normalises its input, and adds to its output or gates it.

The norm's factor is the same for all of a row: it is found beside the sum and multiplies it at the end. So the normed
input is not rounded to 16 bit, as it is between operators; all else rounds where the operators round.

Importing this module imports Triton; see ``triton_kernels``.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sphinxkit.llama.kernels import PLAIN, RowFusion

# What a program reads in one go: 16 bytes a thread of so many outputs. Our choice.
_COLUMNS, _OUTPUTS = 1024, 4


def linear_row(x: Tensor, weight: Tensor, fusion: RowFusion = PLAIN) -> Tensor:
    """One row times a matrix, with what is fused into it.

    Args:
        x: A single row, contiguous.
        weight: Contiguous.
        fusion: What is done besides.
    Shape:
        x: (..., I) with one row
        weight: (O, I)
        return: (..., O), or (..., O/2) if gated
    """
    outputs, width = weight.shape
    out = new_output(x, outputs, fusion)
    block = min(_COLUMNS, max(256, triton.next_power_of_2(width)))
    _linear_row[(triton.cdiv(outputs, _OUTPUTS),)](
        x,
        weight,
        out,
        num_outputs=outputs,
        width=width,
        **fusion_arguments(x, fusion),
        block=block,
        each=_OUTPUTS,
        num_warps=block // 256,
    )
    return out


def new_output(x: Tensor, outputs: int, fusion: RowFusion) -> Tensor:
    """Memory for the product of a row ``x`` (..., I) and a matrix of so many rows."""
    return x.new_empty(*x.shape[:-1], outputs // 2 if fusion.gated else outputs)


def fusion_arguments(x: Tensor, fusion: RowFusion) -> dict[str, Any]:
    """What a row's kernel is told of it; where there is no tensor, ``x`` stands for one that is not read."""
    return {
        "norm": x if fusion.norm is None else fusion.norm,
        "residual": x if fusion.residual is None else fusion.residual,
        "eps": fusion.eps,
        "normed": fusion.norm is not None,
        "adds": fusion.residual is not None,
        "gated": fusion.gated,
    }


@triton.jit
def rows_of_program(num_outputs, each: tl.constexpr, gated: tl.constexpr):
    """Rows of the matrix that this program multiplies, (each,), and which of them exist; gates beside their values."""
    place = tl.program_id(0) * each + tl.arange(0, each)
    if gated:
        return place // 2 + place % 2 * (num_outputs // 2), place < num_outputs
    else:
        return place, place < num_outputs


@triton.jit
def store_outputs(
    result,
    squares,
    out,
    residual,
    num_outputs,
    width,
    eps,
    normed: tl.constexpr,
    adds: tl.constexpr,
    gated: tl.constexpr,
    each: tl.constexpr,
):
    """What comes behind the sums of ``rows_of_program``: the norm's factor, and the gate or the residual."""
    dtype = out.dtype.element_ty
    if normed:
        result = result * tl.rsqrt(squares / width + eps)
    rounded = result.to(dtype).to(tl.float32)
    if gated:
        gate, up = tl.split(tl.reshape(rounded, (each // 2, 2)))
        place = tl.program_id(0) * (each // 2) + tl.arange(0, each // 2)
        gated_up = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * up
        tl.store(out + place, gated_up.to(dtype), mask=place < num_outputs // 2)
    else:
        place = tl.program_id(0) * each + tl.arange(0, each)
        inside = place < num_outputs
        if adds:
            rounded += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + place, rounded.to(dtype), mask=inside)


@triton.jit
def _linear_row(
    x,
    weight,
    out,
    norm,
    residual,
    num_outputs,
    width,
    eps,
    normed: tl.constexpr,
    adds: tl.constexpr,
    gated: tl.constexpr,
    block: tl.constexpr,
    each: tl.constexpr,
):
    outputs, there = rows_of_program(num_outputs, each, gated)
    own = weight + outputs.to(tl.int64)[:, None] * width
    # every tensor has two axes: so all of them have the same columns in a thread, and nothing moves between threads
    total = tl.zeros((each, block), tl.float32)
    squares = tl.zeros((1, block), tl.float32)
    for start in range(0, width, block):
        column = (start + tl.arange(0, block))[None, :]
        inside = column < width
        row = tl.load(own + column, mask=there[:, None] & inside, other=0.0).to(tl.float32)
        given = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
        if normed:
            squares += given * given
            given *= tl.load(norm + column, mask=inside, other=0.0).to(tl.float32)
        total += row * given
    result, square = tl.sum(total, axis=1), tl.sum(tl.sum(squares, axis=1), axis=0)
    store_outputs(result, square, out, residual, num_outputs, width, eps, normed, adds, gated, each)
