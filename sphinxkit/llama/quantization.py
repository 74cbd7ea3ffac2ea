"""Weights of 8 or 4 bits for the language model's linear layers, multiplied by torch's own kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphinxkit.errors import CheckpointError, ShapeError
from sphinxkit.llama.model import LlamaModel

GROUP_SIZES = (32, 64, 128, 256)  # what torch's int4 kernels take
# torch's kernels read beyond the end of other sizes (int8 on CPUs, without a check) or refuse them
_ROW_MULTIPLE, _COLUMN_MULTIPLE = 16, 32


class QuantizedLinear(nn.Module):
    """A linear layer without bias whose weight has 8 or 4 bits; activations keep their dtype.

    - 8 bits: ``w = code * scale``, one scale for each row, symmetric.
    - 4 bits: ``w = (code - 8) * scale + zero``, a scale and a zero for each group of neighbouring columns.

    The codes are packed for the device that the weight is on and stay there. In 8 bits on CUDA the weight is expanded
    at each call: that saves memory and no time.

    Args:
        weight: What to quantise, (O, I), O a multiple of 16 and I of 32.
        bits: 8 or 4.
        group_size: Columns of a group, with 4 bits.
    Shape:
        x: (..., I), in the dtype that ``weight`` had
        return: (..., O)
    Raises:
        ShapeError: ``bits`` or ``group_size`` is not offered, or the weight's size does not fit them.
    Source: The int4 form is torch's ``_weight_int4pack_mm``; rounding to nearest, as gpt-fast and torchao do it.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, bits: int = 4, group_size: int = 64) -> None:
        super().__init__()
        if bits not in (4, 8):
            raise ShapeError(f"quantisation: bits must be 4 or 8, got {bits}")
        if bits == 4 and group_size not in GROUP_SIZES:
            raise ShapeError(f"quantisation: group_size must be one of {GROUP_SIZES}, got {group_size}")
        columns = group_size if bits == 4 else _COLUMN_MULTIPLE
        if weight.shape[0] % _ROW_MULTIPLE or weight.shape[1] % columns:
            raise ShapeError(
                f"quantisation: {bits} bits need rows in multiples of {_ROW_MULTIPLE} and columns in multiples of "
                f"{columns}, got a weight of {tuple(weight.shape)}"
            )
        self.out_features, self.in_features = weight.shape
        self.bits = bits
        self.group_size = group_size
        with torch.no_grad():
            codes, scales = _quantize_rows(weight) if bits == 8 else _quantize_groups(weight, group_size)
            self.register_buffer("codes", codes if bits == 8 else _pack(codes))
            self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to ``x`` (..., I)."""
        rows = x.reshape(-1, self.in_features)
        if self.bits == 8:
            if x.device.type == "cpu":
                out = torch._weight_int8pack_mm(rows, self.codes, self.scales)
            else:
                out = F.linear(rows, self.codes.to(x.dtype)) * self.scales
        elif x.device.type == "cpu":
            out = torch._weight_int4pack_mm_for_cpu(rows, self.codes, self.group_size, self.scales)
        else:
            out = torch._weight_int4pack_mm(rows, self.codes, self.group_size, self.scales)
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        group = f", group_size={self.group_size}" if self.bits == 4 else ""
        return f"{self.in_features}, {self.out_features}, bits={self.bits}{group}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        before = self.codes.device
        if fn(self.codes[:0]).device != before:
            raise CheckpointError(
                f"a quantised layer is packed for {before} and cannot be moved; move the model, then quantise it"
            )
        return cast(QuantizedLinear, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise CheckpointError(
            f"{prefix.rstrip('.') or 'this layer'} is quantised to {self.bits} bits, and quantised weights are not "
            "saved; save the model before quantising it"
        )


def quantize(model: LlamaModel, bits: int = 4, group_size: int = 64, *, lm_head: bool = False) -> None:
    """Replace the linear layers of a LLaMA by quantised ones, in place, one after the other.

    For inference only: the new layers have no parameters, and the model's state dict can no longer be taken. The
    embedding table and the norms stay as they are. Nothing else than torch is needed.

    Args:
        model: On the device where it will run, in the dtype that it will compute in (bfloat16 for 4 bits on CUDA).
        bits: 8 (about 1 % relative error in a layer's output) or 4 (about 10 %).
        group_size: Columns that share a scale with 4 bits: 32, 64, 128 or 256; smaller is more exact.
        lm_head: Whether to quantise the output matrix, too.
    Raises:
        ShapeError: ``bits`` or ``group_size`` is not offered, or a weight's size does not fit them; nothing is changed.
        TypeError: A layer is wrapped, sharded or quantised already; nothing is changed.
    """
    owners = [part for layer in model.layers for part in (layer.get_submodule("attention"), layer.get_submodule("mlp"))]
    found = [(owner, name, linear) for owner in owners for name, linear in owner.named_children()]
    if lm_head:
        found.append((model, "lm_head", model.lm_head))
    for _, name, linear in found:
        if type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter:
            raise TypeError(f"only plain linear layers can be quantised, but {name} is {type(linear).__name__}")
        with torch.device("meta"):  # checks the sizes
            QuantizedLinear(torch.empty(linear.weight.shape), bits, group_size)
    model.unfuse()
    for owner, name, linear in found:
        setattr(owner, name, QuantizedLinear(cast(Tensor, linear.weight).detach(), bits, group_size))


def _quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(O, I) -> codes (O, I) int8, scales (O,) in the weight's dtype."""
    wide = weight.float()
    scales = (wide.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny).to(weight.dtype)
    return (wide / scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scales


def _quantize_groups(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """(O, I) -> codes 0 ... 15 (O, I) int32, scales and zeros (I / group_size, O, 2) in the weight's dtype."""
    groups = weight.float().reshape(len(weight), -1, group_size)
    low, high = groups.amin(-1), groups.amax(-1)
    scales = ((high - low) / 15).clamp_min(1e-6).to(weight.dtype)
    zeros = (low + 8 * scales.float()).to(weight.dtype)
    codes = ((groups - zeros.float()[..., None]) / scales.float()[..., None] + 8).round().clamp(0, 15)
    return codes.flatten(1).to(torch.int32), torch.stack([scales.t(), zeros.t()], dim=-1).contiguous()


def _pack(codes: Tensor) -> Tensor:
    """Codes (O, I) in the layout of the device's int4 kernel."""
    if codes.is_meta:
        return codes
    if codes.device.type == "cpu":
        return torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
    # as many tiles of 16 columns inside as divide the width: the kernel takes 8, 4 or 2
    inner = next(tiles for tiles in (8, 4, 2) if codes.shape[1] % (16 * tiles) == 0)
    return torch._convert_weight_to_int4pack(pairs, inner)
