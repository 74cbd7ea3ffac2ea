"""Products alone: one token and a few against 8- and 4-bit weights, beside 16 bit and torch's int4 kernel.

On CUDA also one token against 16 bit: our kernel beside torch's product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, Context, Work, nbytes
from sphinxkit.llama import QuantizedLinear
from sphinxkit.llama.graphs import _record_cuda_graph
from sphinxkit.llama.kernels import find_kernels, find_rows
from sphinxkit.llama.quantization import _quantize_groups

# (rows, columns): the joint projections of LLaMA-2 13B; on a CPU those of the 220 M model.
SHAPES = {
    "cuda": {"qkv": (15360, 5120), "o": (5120, 5120), "gate and up": (27648, 5120), "down": (5120, 13824)},
    "cpu": {"qkv": (3072, 1024), "gate and up": (5632, 1024), "down": (1024, 2816)},
}
MICRO = {"qkv": (64, 128)}
GROUP_SIZE = 64


def cases(context: Context) -> Iterator[Case]:
    shapes = MICRO if context.micro else SHAPES[context.device.type]
    for name, (outputs, width) in shapes.items():
        # enough copies that no cache holds them
        weights = [
            context.randn(outputs, width, dtype=torch.bfloat16) for _ in range(context.num_input_sets(outputs * width))
        ]
        plain: list[Callable[[Tensor], Tensor]] = [lambda x, weight=weight: F.linear(x, weight) for weight in weights]
        kernels = find_kernels(context.device, "rows")
        if kernels is not None:
            x, count = context.randn(1, width, dtype=torch.bfloat16), len(weights)
            ours = [functools.partial(kernels.linear_row, weight=weight) for weight in weights]
            yield Case(
                f"{name}, {width} to {outputs}, 1 row, 16 bits, {count} products",
                {"sphinxkit": _all(ours, x), "bfloat16": _all(plain, x)},
                Work(2 * count * outputs * width, count * nbytes(weights[0]), count * outputs * 2, dtype=x.dtype),
                amount=count,
                unit="rows",
            )
        for bits in (8, 4):
            layers = [QuantizedLinear(weight, bits, GROUP_SIZE) for weight in weights]
            rivals = [_torch_int4(weight) for weight in weights] if context.device.type == "cuda" and bits == 4 else []
            coded = find_rows(torch.bfloat16, coded=True) if bits == 8 and context.device.type == "cpu" else None
            for rows in context.on([1, 8, 32], [1, 8], [1, 3]):
                x = context.randn(rows, width, dtype=torch.bfloat16)
                candidates = {"sphinxkit": _all(layers, x), "bfloat16": _all(plain, x)}
                if coded is not None:  # as fused layers multiply
                    ours = [
                        functools.partial(coded.linear_rows, weight=layer.codes, scales=layer.scales)
                        for layer in layers
                    ]
                    candidates = {**candidates, "sphinxkit": _all(ours, x), "torch's kernel": candidates["sphinxkit"]}
                if rivals:
                    candidates["torch's int4 kernel"] = _all(rivals, x)
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
    """One product after the other; on CUDA as a graph, as launching takes longer than the smaller ones do."""

    def run() -> Tensor:
        for function in functions:
            out: Tensor = function(x)
        return out

    return _record_cuda_graph(run) if x.is_cuda else run


def _torch_int4(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """The same grid in the layout of torch's own kernel."""
    codes, scales = _quantize_groups(weight, GROUP_SIZE)
    packed = torch._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8), 8)
    return lambda x: torch._weight_int4pack_mm(x, packed, GROUP_SIZE, scales)
