"""Products alone, on a CPU: one token and a few against 8- and 4-bit weights, beside 16 bit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, Context, Work, nbytes
from sphinxkit.acceleration import QuantizedLinear
from sphinxkit.acceleration.cpu import find_gemv

DEVICES = ("cpu",)  # on CUDA torchao multiplies, which "decode" measures
# (rows, columns): the joint projections of the 220 M model.
SHAPES = {"qkv": (3072, 1024), "gate and up": (5632, 1024), "down": (1024, 2816)}
MICRO = {"qkv": (64, 128)}
GROUP_SIZE = 64


def cases(context: Context) -> Iterator[Case]:
    shapes = MICRO if context.micro else SHAPES
    for name, (outputs, width) in shapes.items():
        # enough copies that no cache holds them
        weights = [
            context.randn(outputs, width, dtype=torch.bfloat16) for _ in range(context.num_input_sets(outputs * width))
        ]
        plain: list[Callable[[Tensor], Tensor]] = [lambda x, weight=weight: F.linear(x, weight) for weight in weights]
        for bits in (8, 4):
            layers = [QuantizedLinear(weight, bits, GROUP_SIZE) for weight in weights]
            coded = find_gemv(torch.bfloat16, coded=True) if bits == 8 else None
            for rows in context.pick([1, 8], [1, 3]):
                x = context.randn(rows, width, dtype=torch.bfloat16)
                candidates = {"sphinxkit": _all(layers, x), "bfloat16": _all(plain, x)}
                if coded is not None:  # as fused layers multiply
                    ours = [functools.partial(coded, weight=layer.codes, scales=layer.scales) for layer in layers]
                    candidates = {**candidates, "sphinxkit": _all(ours, x), "torch's kernel": candidates["sphinxkit"]}
                count = len(weights)
                work = Work(
                    2 * count * rows * outputs * width,
                    count * (nbytes(layers[0]) + nbytes(x)),
                    count * rows * outputs * 2,
                    dtype=torch.bfloat16,
                )
                yield Case(
                    f"{name}, {width} to {outputs}, {rows} rows, {bits} bits, {count} products",
                    candidates,
                    work,
                    amount=count * rows,
                    unit="rows",
                )


def _all(functions: Sequence[Any], x: Tensor) -> Callable[[], Tensor]:
    """One product after the other."""

    def run() -> Tensor:
        for function in functions:
            out: Tensor = function(x)
        return out

    return run
