"""The choice between Triton's kernels and torch's operators, by a probing call on the device."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sphinxkit.llama.layers import apply_rope, rope_rotations

Kind = Literal["layers", "quantized", "token"]
Pairs = dict[str, tuple[Tensor, Tensor]]  # what a kernel gives and what is right, by name

# bfloat16 rounds to 2^-9 of values that are at most about 4 here
_TOLERANCE = 0.05


def find_kernels(device: torch.device, kind: Kind = "layers") -> Any:
    """The module of the kernels if they compute the right numbers on a device, else None.

    The answer is kept for each device. A fault of the kernels (not: that Triton is missing) is logged once.

    Args:
        device: Where the model runs.
        kind: "layers": what stands between products; "quantized": products with quantised weights (both of
            ``triton_kernels``); "token": attention of one token per row (``triton_attention``).
    """
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    return _probed(torch.device("cuda", index), kind)


@functools.cache
def _probed(device: torch.device, kind: Kind) -> Any:
    from torch.utils import _triton

    if not _triton.has_triton():
        return None
    name = "triton_attention" if kind == "token" else "triton_kernels"
    kernels = importlib.import_module(f"sphinxkit.llama.{name}")
    fault = kernel_fault(kernels, device, kind)
    if fault is None:
        return kernels
    logging.getLogger(__name__).warning("Triton's kernels (%s) are left out on %s: %s", kind, device, fault)
    return None


def kernel_fault(
    kernels: Any, device: torch.device, kind: Kind = "layers", dtype: torch.dtype = torch.bfloat16
) -> str | None:
    """What is wrong with the kernels on a device, or None if small calls gave what torch's operators give.

    Args:
        kernels: The module, or a stand-in.
        device: Where to call them.
        kind: See ``find_kernels``.
        dtype: Of the numbers.
    """
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    with torch.no_grad(), torch.inference_mode(False):
        try:
            found = _PAIRS[kind](kernels, randn, device).items()
            distances = {name: float((a.float() - b.float()).abs().max()) for name, (a, b) in found}
        except Exception as error:  # a compiler's: whatever it raises means that the kernels cannot be used
            return f"a probing call failed: {type(error).__name__}: {str(error).strip()[:300]}"
    wrong = [f"{name} by {distance:.2g}" for name, distance in distances.items() if not distance < _TOLERANCE]
    return f"wrong numbers: {', '.join(wrong)}" if wrong else None


def _layer_pairs(kernels: Any, randn: Callable[..., Tensor], device: torch.device) -> Pairs:
    x, delta, weight, gate_up = randn(2, 1, 96), randn(2, 1, 96), randn(96), randn(2, 1, 192)
    total, normed = kernels.add_rms_norm(x, delta, weight, 1e-5)
    gate, up = gate_up.chunk(2, -1)
    starts = torch.tensor([3, 1], device=device)
    qkv, rotations = randn(2, 1, 4, 16), rope_rotations(starts[:, None], 16)
    keys, values = (torch.zeros(2, 8, 1, 16, dtype=x.dtype, device=device).transpose(1, 2) for _ in range(2))
    queries = kernels.rotate_and_store(qkv, rotations, starts, keys, values)
    rotated = apply_rope(qkv[:, :, :3], rotations)
    rows = torch.arange(2, device=device)
    return {
        "add_rms_norm, sum": (total, x + delta),
        "add_rms_norm": (normed, F.rms_norm(x + delta, (96,), None, 1e-5) * weight),
        "silu_mul": (kernels.silu_mul(gate_up), F.silu(gate) * up),
        "rotate_and_store, queries": (queries, rotated[:, :, :2]),
        "rotate_and_store, keys": (keys[rows, :, starts], rotated[:, 0, 2:]),
        "rotate_and_store, values": (values[rows, :, starts], qkv[:, 0, 3:]),
    }


def _quantized_pairs(kernels: Any, randn: Callable[..., Tensor], device: torch.device) -> Pairs:
    codes = (randn(24, 64) * 40).clamp(-127, 127).to(torch.int8)
    scales = {8: randn(24).abs() / 512, 4: randn(24, 4, 2) / 16}
    found = {}
    for bits, packed in ((8, codes), (4, codes.view(torch.uint8))):
        expanded = expand_codes(packed, scales[bits], bits, 32, torch.float32)
        for count in (1, 3):
            x = randn(count, expanded.shape[1]) / 8
            found[f"quantized_linear, {bits} bits, {count} rows"] = (
                kernels.quantized_linear(x, packed, scales[bits], bits, 32),
                x.float() @ expanded.T,
            )
    return found


def _token_pairs(kernels: Any, randn: Callable[..., Tensor], device: torch.device) -> Pairs:
    keys, values = (randn(2, 200, 2, 64).transpose(1, 2) for _ in range(2))
    starts = torch.tensor([150, 3], device=device)
    seen = (torch.arange(200, device=device) <= starts[:, None])[:, None, None]
    found = {}
    for heads in (2, 4):
        q = randn(2, heads, 1, 64)
        k, v = (x.float().repeat_interleave(heads // 2, dim=1) for x in (keys, values))
        expected = F.scaled_dot_product_attention(q.float(), k, v, attn_mask=seen)
        found[f"attend_token, {heads} heads"] = (kernels.attend_token(q, keys, values, starts), expected)
    return found


_PAIRS: dict[Kind, Callable[..., Pairs]] = {
    "layers": _layer_pairs,
    "quantized": _quantized_pairs,
    "token": _token_pairs,
}


def expand_codes(codes: Tensor, scales: Tensor, bits: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """The weight that codes stand for, as ``triton_kernels.quantized_linear`` takes them.

    Args:
        codes: 8 bits: int8; 4 bits: two to a byte, the even column's in the lower half.
        scales: 8 bits: of each row; 4 bits: a scale and a zero of each group.
        bits: 8 or 4.
        group_size: Columns of a group, with 4 bits.
        dtype: Of the weight.
    Shape:
        codes: (O, I) or (O, I/2)
        scales: (O,) or (O, I / group_size, 2)
        return: (O, I)
    """
    if bits == 8:
        return codes.to(dtype) * scales[:, None].to(dtype)
    pairs = torch.stack([codes & 15, codes >> 4], dim=-1)
    groups = pairs.view(len(codes), -1, group_size).to(dtype) - 8
    scale, zero = scales.to(dtype)[..., None].unbind(2)
    return torch.addcmul(zero, groups, scale).flatten(1)
