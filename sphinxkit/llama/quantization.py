"""Weights of 8 or 4 bits for the language model's linear layers, multiplied by torch's own kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphinxkit.errors import CheckpointError, ShapeError
from sphinxkit.llama.backends import HALF_DTYPES
from sphinxkit.llama.kernels import expand_codes, find_kernels, pack_codes

if TYPE_CHECKING:
    from sphinxkit.llama.model import LlamaModel

GROUP_SIZES = (32, 64, 128, 256)  # what torch's int4 kernels take
# torch's kernels read beyond the end of other sizes (int8 on CPUs, without a check) or refuse them
_ROW_MULTIPLE, _COLUMN_MULTIPLE = 16, 32
# Rows of x from which on a CPU multiplies faster with 8-bit codes expanded than by torch's kernel for them. Measured on
# Zen 4, where 1519 rows take two fifths of the time: our choice.
_EXPAND_ROWS = 24
_JOINT_ROWS = 64  # the largest block of rows that torch packs 4-bit codes in, on CPUs


class QuantizedLinear(nn.Module):
    """A linear layer without bias whose weight has 8 or 4 bits; activations keep their dtype.

    - 8 bits: ``w = code * scale``, one scale for each row, symmetric.
    - 4 bits: ``w = (code - 8) * scale + zero``, a scale and a zero for each group of neighbouring columns.

    The codes are packed for the device that the weight is on and stay there. On CUDA up to 32 rows (in
    float32: one) are multiplied by kernels of ours where Triton is installed; more rows, as in a prefill, meet the
    weight expanded for the call, by a kernel of ours too, and compiled steps by torch's operators. On a CPU many rows
    meet 8 bits expanded for the call, rounded to their dtype; few go through torch's kernel, in a fused model through
    ours (``cpu_rows``), which rounds the input to 16 bits: both change less than a quarter of what quantising did.

    Args:
        weight: What to quantise, (O, I), O a multiple of 16 and I of 32.
        bits: 8 or 4.
        group_size: Columns of a group, with 4 bits.
    Shape:
        x: (..., I), in the dtype that ``weight`` had
        return: (..., O)
    Raises:
        ShapeError: ``bits`` or ``group_size`` is not offered, or the weight's size does not fit them.
    Source: The 4-bit form is that of torch's ``_weight_int4pack_mm``; rounded to nearest, as gpt-fast and torchao do.
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
            if weight.device.type != "cpu":
                codes = pack_codes(codes if bits == 4 else codes.int() + 128, bits)
                scales = scales.transpose(0, 1).contiguous() if bits == 4 else scales
            elif bits == 4:
                codes = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
            self.register_buffer("codes", codes)
            self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to ``x`` (..., I)."""
        rows = x.reshape(-1, self.in_features)
        if x.device.type == "cpu":
            if self.bits == 8 and len(rows) >= _EXPAND_ROWS:
                out = F.linear(rows, self.codes.to(self.scales.dtype).mul_(self.scales[:, None]))
            elif self.bits == 8:
                out = torch._weight_int8pack_mm(rows, self.codes, self.scales)
            else:
                scales = self.scales.contiguous()  # of a joint layer's part they are not
                out = torch._weight_int4pack_mm_for_cpu(rows, self.codes, self.group_size, scales)
        else:
            packed = (self.codes, self.scales, self.bits, self.group_size)
            kernels = None if torch.compiler.is_compiling() else find_kernels(x.device, "quantized")
            if kernels is None:
                out = F.linear(rows, expand_codes(*packed, rows.dtype))
            elif len(rows) > (kernels.MAX_ROWS if rows.dtype in HALF_DTYPES else 1):
                out = F.linear(rows, kernels.expand(*packed, rows.dtype))
            else:
                out = kernels.quantized_linear(rows.contiguous(), *packed)
        return out.view(*x.shape[:-1], self.out_features)

    @staticmethod
    def join(layers: Sequence[QuantizedLinear]) -> QuantizedLinear:
        """One layer for several that read the same input: its output is theirs side by side.

        The codes move into it, and the given layers hold views of them; a single layer is its own.

        Args:
            layers: Of the same width, bits and group size, on one device.
        Raises:
            TypeError: They differ, or their packed codes cannot stand side by side.
        """
        kinds = {
            (each.in_features, each.bits, each.group_size, each.codes.device, each.codes.shape[1:]) for each in layers
        }
        if len(kinds) > 1:
            raise TypeError("quantised layers of different kinds cannot be joined")
        first = layers[0]
        if len(layers) == 1:
            return first
        is_packed = first.bits == 4 and first.codes.device.type == "cpu"
        axis = 1 if is_packed else 0  # of the rows in scales
        if is_packed and any(each.out_features % _JOINT_ROWS for each in layers):
            raise TypeError(f"quantised layers of 4 bits can be joined only with rows in multiples of {_JOINT_ROWS}")
        joint = QuantizedLinear.__new__(QuantizedLinear)
        nn.Module.__init__(joint)
        joint.out_features = sum(each.out_features for each in layers)
        joint.in_features, joint.bits, joint.group_size = first.in_features, first.bits, first.group_size
        joint.register_buffer("codes", torch.cat([each.codes for each in layers]))
        joint.register_buffer("scales", torch.cat([each.scales for each in layers], axis))
        codes = torch.split(joint.codes, [len(each.codes) for each in layers])
        scales = torch.split(joint.scales, [each.out_features for each in layers], axis)
        for each, own_codes, own_scales in zip(layers, codes, scales, strict=True):
            each.codes, each.scales = own_codes, own_scales
        return joint.eval()

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
    embedding table and the norms stay as they are. Nothing else than torch is needed. It undoes ``model.fuse()``, which
    can be called afterwards.

    Args:
        model: On the device where it will run, in the dtype that it will compute in.
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
