"""The choice between the CPU's GEMV kernel and torch's operators, by a probing call."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from sphinxkit.acceleration.cpu.gemv import MAX_ROWS, Gemv, find_compiler
from sphinxkit.acceleration.ops import PLAIN, FusedOps
from sphinxkit.acceleration.quantization import quantize_rows

# Of 1 + the right number. bfloat16 rounds to 2^-9 of each number, some twice or before a product: the worst
# of 140,000 results was off by 0.014 to 0.025, by seed. float32 rounds to 2^-24.
_TOLERANCES = {torch.bfloat16: 0.03, torch.float32: 1e-4}
# With codes, whose input is rounded to 2^-16 of its largest number in each of 2100 products: of 500,000 results one is
# off by 0.018 in bfloat16 and by 0.0005 in float32.
_CODED_TOLERANCES = {torch.bfloat16: 0.03, torch.float32: 2e-3}


@functools.cache
def find_gemv(dtype: torch.dtype, coded: bool) -> Gemv | None:
    """The CPU's kernel for the products of a few rows, compiled, if it computes the right numbers; else None.

    The answer is kept. A fault (not: that there is no compiler) is logged once.

    Args:
        dtype: bfloat16 or float32.
        coded: Whether matrices have codes of 8 bits.
    """
    try:
        compiler = find_compiler()
        if compiler is None:
            return None
        gemv = Gemv(dtype, compiler, coded=coded)
    except Exception as error:  # CC may name any program; every failure means: no kernel
        fault: str | None = f"{type(error).__name__}: {error}"
    else:
        fault = gemv_fault(gemv)
        if fault is None:
            return gemv
    logging.getLogger(__name__).warning("the CPU's GEMV kernel is left out: %s", fault)
    return None


def gemv_fault(gemv: Gemv) -> str | None:
    """What is wrong with a kernel, or None if small calls gave what torch's operators give."""
    generator = torch.Generator("cpu").manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(gemv.dtype)

    # whole lines of registers and a rest, with codes two stretches; several rows for each of a hundred threads
    width, outputs = 2100 if gemv.coded else 150, 522
    wrong = []
    with torch.no_grad(), torch.inference_mode(False):
        weight, norm = randn(outputs, width) / width**0.5, randn(width)
        scales, given = None, weight
        if gemv.coded:
            given, scales = quantize_rows(weight)
            weight = given.float() * scales.float()[:, None]
        for rows in range(1, MAX_ROWS + 1):
            x = 3 * randn(rows, width)
            for name, ops in {"gated": FusedOps(norm, 1e-5, gated=True), "plain": PLAIN}.items():
                try:
                    got = gemv(x, given, ops, scales).float()
                except Exception as error:  # of code that was made here: whatever it raises means that it is no use
                    return f"a probing call failed: {type(error).__name__}: {str(error).strip()[:300]}"
                expected = multiply_exactly(x, weight, ops)
                distance = float(((got - expected).abs() / (1 + expected.abs())).max())
                if not distance < (_CODED_TOLERANCES if gemv.coded else _TOLERANCES)[gemv.dtype]:
                    wrong.append(f"{rows} rows, {name} by {distance:.2g}")
    return f"wrong numbers: {', '.join(wrong)}" if wrong else None


def multiply_exactly(x: Tensor, weight: Tensor, ops: FusedOps = PLAIN) -> Tensor:
    """What the kernel computes, by torch's operators in float32.

    Args:
        x: Rows.
        weight: The matrix.
        ops: What is done besides.
    Shape:
        x: (..., I)
        weight: (O, I)
        return: (..., O), or (..., O/2) if gated
    """
    wide = FusedOps(None if ops.norm is None else ops.norm.float(), ops.eps, ops.gated)
    return wide.after(wide.before(x.float()) @ weight.float().T)
