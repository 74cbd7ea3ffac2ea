"""The choice between kernels of ours and torch's operators, by a probing call on the device."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sphinxkit.llama.layers import apply_rope, precompute_freqs_cis

if TYPE_CHECKING:
    from sphinxkit.llama.cpu_rows import CpuRows

Kind = Literal["layers", "rows", "quantized", "token"]
_MODULES: dict[Kind, str] = {
    "layers": "triton_kernels",
    "rows": "triton_rows",
    "quantized": "triton_quantized",
    "token": "triton_attention",
}
Pairs = dict[str, tuple[Tensor, Tensor]]  # what a kernel gives and what is right, by name

_LOOPED = 2304  # columns that no program of a row's products reads in one go
# Of 1 + the right number: bfloat16 rounds to 2^-9 of each number, some twice or before a product; float32 to 2^-24.
_TOLERANCES = {torch.bfloat16: 0.02, torch.float16: 0.02, torch.float32: 1e-4}
# With codes on a CPU, whose input is rounded to 2^-16 of its largest number in each of 2100 products: of 500,000
# results one is off by 0.018 in bfloat16 and by 0.0005 in float32.
_CODED_TOLERANCES = {torch.bfloat16: 0.03, torch.float32: 2e-3}


@dataclass(frozen=True, slots=True, eq=False)
class RowFusion:
    """What the product of a few rows with a matrix does besides: ``residual + weight @ (RMS norm of x)``, or a gate.

    Args:
        norm: Scale of each channel of the RMS norm of the input, (I,); None: the input as it is.
        eps: Added to the mean square.
        residual: Added to the product, (..., O), contiguous; None: nothing is.
        gated: The first half of the matrix gives gates g and the second values u; the result is ``silu(g) * u``.
    """

    norm: Tensor | None = None
    eps: float = 0.0
    residual: Tensor | None = None
    gated: bool = False


PLAIN = RowFusion()


def find_kernels(device: torch.device, kind: Kind = "layers") -> Any:
    """The module of the kernels if they compute the right numbers on a device, else None; on a CPU see ``find_rows``.

    The answer is kept for each device. A fault of the kernels (not: that Triton is missing) is logged once. Triton
    starts kernels on torch's current device alone, so there are none for another.

    Args:
        device: Where the model runs.
        kind: "layers": what stands between products (``triton_kernels``); "rows": one row's products
            (``triton_rows``); "quantized": products with quantised weights (``triton_quantized``); "token": attention
            of one token per row (``triton_attention``).
    """
    if device.type != "cuda":
        return None
    current = torch.cuda.current_device()
    if device.index not in (None, current):
        _warn_of_device(device)
        return None
    return _probed(torch.device("cuda", current), kind)


@functools.cache
def _warn_of_device(device: torch.device) -> None:
    logging.getLogger(__name__).warning(
        "Triton's kernels are left out on %s, as it is not torch's current device (torch.cuda.set_device)", device
    )


@functools.cache
def _probed(device: torch.device, kind: Kind) -> Any:
    from torch.utils import _triton

    if not _triton.has_triton():
        return None
    kernels = importlib.import_module(f"sphinxkit.llama.{_MODULES[kind]}")
    fault = kernel_fault(kernels, device, kind)
    if fault is None:
        return kernels
    logging.getLogger(__name__).warning("Triton's kernels (%s) are left out on %s: %s", kind, device, fault)
    return None


@functools.cache
def find_rows(dtype: torch.dtype, coded: bool) -> CpuRows | None:
    """The CPU's kernel for the products of a few rows, compiled, if it computes the right numbers; else None.

    The answer is kept. A fault (not: that there is no compiler) is logged once.

    Args:
        dtype: bfloat16 or float32.
        coded: Whether matrices have codes of 8 bits.
    """
    from sphinxkit.llama import cpu_rows

    try:
        compiler = cpu_rows.find_compiler()
        if compiler is None:
            return None
        rows = cpu_rows.CpuRows(dtype, compiler, coded=coded)
    except Exception as error:  # it runs what CC says: whatever comes of it means that there is no kernel
        fault: str | None = f"{type(error).__name__}: {error}"
    else:
        fault = kernel_fault(rows, torch.device("cpu"), "few rows", dtype)
        if fault is None:
            return rows
    logging.getLogger(__name__).warning("The CPU's kernel for a few rows is left out: %s", fault)
    return None


def kernel_fault(
    kernels: Any,
    device: torch.device,
    kind: Kind | Literal["few rows"] = "layers",
    dtype: torch.dtype = torch.bfloat16,
) -> str | None:
    """What is wrong with the kernels on a device, or None if small calls gave what torch's operators give.

    Args:
        kernels: The module, or a stand-in.
        device: Where to call them.
        kind: See ``find_kernels``; "few rows": ``cpu_rows``.
        dtype: Of the numbers.
    """
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    with torch.no_grad(), torch.inference_mode(False):
        try:
            found = _PAIRS[kind](kernels, randn, device).items()
            distances = {name: float(((a - b.float()).abs() / (1 + b.float().abs())).max()) for name, (a, b) in found}
        except Exception as error:  # a compiler's: whatever it raises means that the kernels cannot be used
            return f"a probing call failed: {type(error).__name__}: {str(error).strip()[:300]}"
    tolerance = _CODED_TOLERANCES[dtype] if getattr(kernels, "coded", False) else _TOLERANCES[dtype]
    wrong = [f"{name} by {distance:.2g}" for name, distance in distances.items() if not distance < tolerance]
    return f"wrong numbers: {', '.join(wrong)}" if wrong else None


def _layer_pairs(kernels: Any, randn: Callable[..., Tensor], device: torch.device) -> Pairs:
    x, delta, weight, gate_up = randn(2, 1, 96), randn(2, 1, 96), randn(96), randn(2, 1, 192)
    total, normed = kernels.add_rms_norm(x, delta, weight, 1e-5)
    gate, up = gate_up.chunk(2, -1)
    starts = torch.tensor([3, 1], device=device)
    qkv, freqs_cis = randn(2, 1, 4, 16), precompute_freqs_cis(starts[:, None], 16)
    keys, values = (torch.zeros(2, 8, 1, 16, dtype=x.dtype, device=device).transpose(1, 2) for _ in range(2))
    queries = kernels.rotate_and_store(qkv, freqs_cis, starts, keys, values)
    rotated = apply_rope(qkv[:, :, :3], freqs_cis)
    rows = torch.arange(2, device=device)
    return {
        "add_rms_norm, sum": (total, x + delta),
        "add_rms_norm": (normed, F.rms_norm(x + delta, (96,), None, 1e-5) * weight),
        "silu_mul": (kernels.silu_mul(gate_up), F.silu(gate) * up),
        "rotate_and_store, queries": (queries, rotated[:, :, :2]),
        "rotate_and_store, keys": (keys[rows, :, starts], rotated[:, 0, 2:]),
        "rotate_and_store, values": (values[rows, :, starts], qkv[:, 0, 3:]),
    }


def _row_pairs(kernels: Any, randn: Callable[..., Tensor], device: torch.device) -> Pairs:
    width = _LOOPED
    # an input of another size than its norm gives it
    weight, x, residual, norm = randn(24, width) / width**0.5, 3 * randn(1, width), randn(1, 24), randn(width)
    return {
        f"linear_row, {name}": (kernels.linear_row(x, weight, fusion), multiply_row(x, weight, fusion))
        for name, fusion in _fusions(norm, residual).items()
    }


def _few_row_pairs(kernels: Any, randn: Callable[..., Tensor], device: torch.device) -> Pairs:
    from sphinxkit.llama.cpu_rows import MAX_ROWS
    from sphinxkit.llama.quantization import _quantize_rows

    # whole lines of registers and a rest, with codes two stretches; several rows for each of a hundred threads
    width, outputs = 2100 if kernels.coded else 150, 522
    weight, norm = randn(outputs, width) / width**0.5, randn(width)
    scales, given = None, weight
    if kernels.coded:
        given, scales = _quantize_rows(weight)
        weight = given.float() * scales.float()[:, None]
    found = {}
    for rows in range(1, MAX_ROWS + 1):
        x = 3 * randn(rows, width)
        for name, fusion in _fusions(norm, randn(rows, outputs)).items():
            pair = kernels.linear_rows(x, given, fusion, scales), multiply_row(x, weight, fusion)
            found[f"linear_rows, {rows}, {name}"] = pair
    return found


def _fusions(norm: Tensor, residual: Tensor) -> dict[str, RowFusion]:
    return {"gated": RowFusion(norm, 1e-5, gated=True), "added": RowFusion(residual=residual)}


def multiply_row(x: Tensor, weight: Tensor, fusion: RowFusion = PLAIN) -> Tensor:
    """What ``triton_rows.linear_row`` and ``cpu_rows`` compute, by torch's operators in float32.

    Args:
        x: One row or several.
        weight: The matrix.
        fusion: What is done besides.
    Shape:
        x: (..., I)
        weight: (O, I)
        return: (..., O), or (..., O/2) if gated
    """
    given = x.float()
    if fusion.norm is not None:
        given = F.rms_norm(given, given.shape[-1:], fusion.norm.float(), fusion.eps)
    out = given @ weight.float().T
    if fusion.gated:
        gate, up = out.chunk(2, -1)
        return F.silu(gate) * up
    return out if fusion.residual is None else out + fusion.residual.float()


def _quantized_pairs(kernels: Any, randn: Callable[..., Tensor], device: torch.device) -> Pairs:
    def pack(outputs: int, width: int, bits: int) -> tuple[Tensor, Tensor, int, int]:
        half = 1 << (bits - 1)
        codes = (randn(outputs, width).float() * half / 3 + half).round().clamp(0, 2 * half - 1)
        scales = randn(outputs).abs() / 64 if bits == 8 else randn(outputs, width // 32, 2) / 6
        return pack_codes(codes.int(), bits), scales, bits, 32

    found = {}
    for bits in (8, 4):
        packed = pack(24, 128, bits)
        expanded = expand_codes(*packed, torch.float32)
        found[f"expand, {bits} bits"] = (kernels.expand(*packed, torch.float32), expanded)
        x = randn(3, 128) / 8
        found[f"quantized_linear, {bits} bits"] = (kernels.quantized_linear(x, *packed), multiply_row(x, expanded))
        # few outputs and many go to programs of different sizes
        for outputs, width in ((24, _LOOPED), (kernels.MANY_OUTPUTS, _LOOPED // 2)):
            packed = pack(outputs, width, bits)
            expanded = expand_codes(*packed, torch.float32)
            x, norm, residual = randn(1, width) / width**0.5, randn(width), randn(1, outputs)
            for name, fusion in _fusions(norm / width**0.5, residual).items():
                found[f"quantized_row, {bits} bits, {outputs} outputs, {name}"] = (
                    kernels.quantized_row(x, *packed, fusion),
                    multiply_row(x, expanded, fusion),
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


_PAIRS: dict[str, Callable[..., Pairs]] = {
    "layers": _layer_pairs,
    "rows": _row_pairs,
    "few rows": _few_row_pairs,
    "quantized": _quantized_pairs,
    "token": _token_pairs,
}


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes in words of 32 bits, as ``triton_quantized`` and ``expand_codes`` read them.

    Four words hold 16 or 32 neighbouring columns, the first 4 of them in the lowest bits of each: so a thread that
    reads four words as one needs four neighbours of the input for each place of the words.

    Args:
        codes: From 0 to 2^bits - 1.
        bits: 8 or 4.
    Shape:
        codes: (O, I) int32, I a multiple of 128 / bits
        return: (O, I * bits / 32) int32, contiguous
    """
    parts = codes.reshape(len(codes), -1, 32 // bits, 4)
    words = torch.zeros_like(parts[:, :, 0], memory_format=torch.contiguous_format)
    for index in range(32 // bits):
        words |= parts[:, :, index] << bits * index
    return words.flatten(1)


def expand_codes(codes: Tensor, scales: Tensor, bits: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """The weight that codes stand for, as ``triton_quantized.quantized_linear`` takes them.

    Args:
        codes: From ``pack_codes``.
        scales: 8 bits: of each row; 4 bits: a scale and a zero of each group.
        bits: 8 or 4.
        group_size: Columns of a group, with 4 bits.
        dtype: Of the weight.
    Shape:
        codes: (O, I * bits / 32) int32
        scales: (O,) or (O, I / group_size, 2)
        return: (O, I)
    """
    words = codes.view(len(codes), -1, 4)
    centred = torch.empty(len(codes), words.shape[1], 32 // bits, 4, dtype=dtype, device=codes.device)
    for index in range(32 // bits):  # one place at a time: integers take more memory than the weight
        centred[:, :, index] = (words >> bits * index & (1 << bits) - 1) - (1 << (bits - 1))
    if bits == 8:
        return centred.flatten(1).mul_(scales[:, None].to(dtype))
    scale, zero = scales.to(dtype)[..., None].unbind(2)
    return torch.addcmul(zero, centred.view(len(codes), -1, group_size), scale).flatten(1)
