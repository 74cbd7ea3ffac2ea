"""Sizes, random weights, FLOPs and distances: what a benchmark counts and compares."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Module = TypeVar("Module", bound=torch.nn.Module)
# Random weights repeat after so many: drawing billions of them takes a CPU minutes. A prime, so that no two rows of a
# matrix are alike (which would make ties); our choice.
NOISE_ELEMENTS = 2**22 + 15


def nbytes(*values: object) -> int:
    """Bytes of tensors, nested in lists, tuples and modules (their parameters and buffers)."""
    total = 0
    for value in values:
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size()
        elif isinstance(value, torch.nn.Module):
            total += nbytes(*value.parameters(), *value.buffers())
        elif isinstance(value, list | tuple):
            total += nbytes(*value)
    return total


def build_random(build: Callable[[], Module], device: torch.device, dtype: torch.dtype) -> Module:
    """A module with random weights, built on meta so that it exists only once, in its dtype, on its device.

    Our choice, so that every layer matters and activations stay finite: matrices and kernels have a standard deviation
    of 1 / sqrt(fan in), vectors called ``weight`` or ``gamma`` (norms, layer scales) lie around 1, the rest around 0.

    Raises:
        ValueError: The module has buffers, which would be left without values.
    """
    with torch.device("meta"):
        module = build()
    if any(True for _ in module.buffers()):
        raise ValueError(f"{type(module).__name__} has buffers: {[name for name, _ in module.named_buffers()]}")
    module = module.to(dtype).to_empty(device=device)
    largest = max((parameter.numel() for parameter in module.parameters()), default=0)
    noise = torch.randn(min(NOISE_ELEMENTS, largest), device=device)
    for name, parameter in module.named_parameters():
        centre = 1.0 if parameter.ndim == 1 and name.endswith(("weight", "gamma")) else 0.0
        fan_in = parameter.numel() // parameter.shape[0] if parameter.ndim in (2, 4) else 2500
        values = (noise * fan_in**-0.5 + centre).to(dtype)
        shift = torch.randint(len(noise), ()).item()  # small tensors must not all begin alike
        values = values.roll(-int(shift))
        with torch.no_grad():
            for part in parameter.view(-1).split(len(values)):
                part.copy_(values[: len(part)])
    return module.eval()


def count_flops(build: Callable[[], Callable[..., object]], *shapes: tuple[int, ...]) -> int:
    """FLOPs of a model's forward, counted operator by operator on the meta device: nothing is computed or allocated.

    Args:
        build: Builds the callable; runs under ``torch.device("meta")``.
        shapes: Shapes of its (float32) inputs.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = build()
        inputs = [torch.empty(shape) for shape in shapes]
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(*inputs)
    return counter.get_total_flops()


def difference(output: object, reference: object) -> float:
    """Relative L2 distance in float64; infinite for other shapes, other lengths or NaN."""
    if isinstance(output, Tensor) and isinstance(reference, Tensor):
        if output.shape != reference.shape:
            return math.inf
        a, b = output.detach().double().cpu(), reference.detach().double().cpu()
        if torch.equal(a, b):
            return 0.0
        distance = ((a - b).norm() / b.norm().clamp_min(1e-30)).item()
        return distance if math.isfinite(distance) else math.inf
    if isinstance(output, list | tuple) and isinstance(reference, list | tuple) and len(output) == len(reference):
        return max((difference(a, b) for a, b in zip(output, reference, strict=True)), default=0.0)
    return 0.0 if output == reference else math.inf
