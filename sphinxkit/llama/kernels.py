"""The choice between Triton's kernels and torch's operators, by a probing call on the device."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sphinxkit.llama.layers import apply_rope, rope_rotations

# bfloat16 rounds to 2^-9 of values that are at most about 4 here
_TOLERANCE = 0.05


def find_kernels(device: torch.device) -> Any:
    """The module ``triton_kernels`` if it computes the right numbers on a device, else None.

    The answer is kept for each device. A fault of the kernels (not: that Triton is missing) is logged once.

    Args:
        device: Where the model runs.
    """
    if device.type != "cuda":
        return None
    return _probed(torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index))


@functools.cache
def _probed(device: torch.device) -> Any:
    from torch.utils import _triton

    if not _triton.has_triton():
        return None
    from sphinxkit.llama import triton_kernels

    fault = kernel_fault(triton_kernels, device)
    if fault is None:
        return triton_kernels
    logging.getLogger(__name__).warning("Triton's kernels are left out on %s: %s", device, fault)
    return None


def kernel_fault(kernels: Any, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """What is wrong with the kernels on a device, or None if small calls gave what torch's operators give.

    Args:
        kernels: The module, or a stand-in.
        device: Where to call them.
        dtype: Of the numbers.
    """
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def pairs() -> dict[str, tuple[Tensor, Tensor]]:
        x, delta, weight, gate_up = randn(2, 1, 96), randn(2, 1, 96), randn(96), randn(2, 1, 192)
        total, normed = kernels.add_rms_norm(x, delta, weight, 1e-5)
        gate, up = gate_up.chunk(2, -1)
        starts = torch.tensor([3, 1], device=device)
        qkv, rotations = randn(2, 1, 4, 16), rope_rotations(starts[:, None], 16)
        keys, values = (torch.zeros(2, 8, 1, 16, dtype=dtype, device=device).transpose(1, 2) for _ in range(2))
        queries = kernels.rotate_and_store(qkv, rotations, starts, keys, values)
        rotated = apply_rope(qkv[:, :, :3], rotations)
        rows = torch.arange(2, device=device)
        found = {
            "add_rms_norm, sum": (total, x + delta),
            "add_rms_norm": (normed, F.rms_norm(x + delta, (96,), None, 1e-5) * weight),
            "silu_mul": (kernels.silu_mul(gate_up), F.silu(gate) * up),
            "rotate_and_store, queries": (queries, rotated[:, :, :2]),
            "rotate_and_store, keys": (keys[rows, :, starts], rotated[:, 0, 2:]),
            "rotate_and_store, values": (values[rows, :, starts], qkv[:, 0, 3:]),
        }
        codes = torch.randint(-127, 128, (24, 64), generator=generator).to(device, torch.int8)
        scales = randn(24).abs() / 512
        nibbles, steps = codes.view(torch.uint8), randn(24, 4, 2) / 16
        low, high = nibbles & 15, nibbles >> 4
        groups = torch.stack([low, high], -1).view(24, 4, 32).float() - 8
        expanded = (groups * steps[..., :1].float() + steps[..., 1:].float()).flatten(1)
        for count in (1, 3):
            rows_8, rows_4 = randn(count, 64) / 8, randn(count, 128) / 8
            found[f"quantized_linear, 8 bits, {count} rows"] = (
                kernels.quantized_linear(rows_8, codes, scales, 8, 32),
                rows_8.float() @ (codes.float() * scales.float()[:, None]).T,
            )
            found[f"quantized_linear, 4 bits, {count} rows"] = (
                kernels.quantized_linear(rows_4, nibbles, steps, 4, 32),
                rows_4.float() @ expanded.T,
            )
        return found

    with torch.no_grad(), torch.inference_mode(False):
        try:
            distances = {name: float((a.float() - b.float()).abs().max()) for name, (a, b) in pairs().items()}
        except Exception as error:  # a compiler's: whatever it raises means that the kernels cannot be used
            return f"a probing call failed: {type(error).__name__}: {str(error).strip()[:300]}"
    wrong = [f"{name} by {distance:.2g}" for name, distance in distances.items() if not distance < _TOLERANCE]
    return f"wrong numbers: {', '.join(wrong)}" if wrong else None
