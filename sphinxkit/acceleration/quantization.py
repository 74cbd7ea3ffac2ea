"""Weights of 8 or 4 bits for the language model's linear layers.

On a CPU they are multiplied by torch's own kernels, and few rows of 8 bits by ours (``cpu.gemv``). On CUDA torchao does
both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphinxkit.errors import CheckpointError, DataError, ShapeError
from sphinxkit.llama.layers import RMSNorm
from sphinxkit.llama.model import LlamaModel
from sphinxkit.llama.moe import Experts

GROUP_SIZES = (32, 64, 128, 256)  # what torch's int4 kernels take
# torch's kernels read beyond the end of other sizes (int8, without a check) or refuse them
_ROW_MULTIPLE, _COLUMN_MULTIPLE = 16, 32
# Rows of x from which on a CPU multiplies faster with 8-bit codes expanded than by torch's kernel for them. Measured on
# Zen 4, where 1519 rows take two fifths of the time: our choice.
_EXPAND_ROWS = 24
_JOINT_ROWS = 64  # the largest block of rows in torch's layout of 4-bit codes


class QuantizedLinear(nn.Module):
    """A linear layer for CPUs whose weight has 8 or 4 bits; activations and the bias keep their dtype.

    - 8 bits: ``w = code * scale``, one scale for each row, symmetric.
    - 4 bits: ``w = (code - 8) * scale + zero``, a scale and a zero for each group of neighbouring columns.

    Many rows meet 8 bits expanded for the call, rounded to their dtype. Few go through torch's kernel, in a fused model
    through ours, which rounds the input to 16 bits: both change less than a quarter of what quantising did.

    Args:
        weight: What to quantise, (O, I) on a CPU, O a multiple of 16 and I of 32.
        bits: 8 or 4.
        group_size: Columns of a group, with 4 bits.
        bias: (O,), added to the product.
    Shape:
        x: (..., I), in the dtype that ``weight`` had
        return: (..., O)
    Raises:
        ShapeError: ``bits`` or ``group_size`` is not offered, or the weight's size does not fit them.
    Source: The 4-bit form is that of torch's ``_weight_int4pack_mm``; rounded to nearest, as gpt-fast and torchao do.
    """

    codes: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bits: int = 4, group_size: int = 64, bias: Tensor | None = None) -> None:
        super().__init__()
        _check_options(bits, group_size)
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
            codes, scales = quantize_rows(weight) if bits == 8 else _quantize_groups(weight, group_size)
            if bits == 4 and weight.device.type == "cpu":  # on meta only the sizes are checked
                codes = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
            self.register_buffer("codes", codes)
            self.register_buffer("scales", scales)
            self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to ``x`` (..., I). Shape: as the class."""
        rows = x.reshape(-1, self.in_features)
        if self.bits == 8 and len(rows) >= _EXPAND_ROWS:
            out = F.linear(rows, self.codes.to(self.scales.dtype).mul_(self.scales[:, None]))
        elif self.bits == 8:
            out = torch._weight_int8pack_mm(rows, self.codes, self.scales)
        else:
            scales = self.scales.contiguous()  # of a joint layer's part they are not
            out = torch._weight_int4pack_mm_for_cpu(rows, self.codes, self.group_size, scales)
        out = out.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias

    @staticmethod
    def check_join(layers: Sequence[QuantizedLinear]) -> None:
        """Raise where ``join`` would.

        Args:
            layers: As for ``join``.
        Raises:
            TypeError: As ``join``.
        """
        kinds = {(each.in_features, each.bits, each.group_size, each.codes.shape[1:]) for each in layers}
        if len(kinds) > 1:
            raise TypeError("quantised layers of different kinds cannot be joined")
        if len(layers) > 1 and layers[0].bits == 4 and any(each.out_features % _JOINT_ROWS for each in layers):
            raise TypeError(f"quantised layers of 4 bits can be joined only with rows in multiples of {_JOINT_ROWS}")

    @staticmethod
    def join(layers: Sequence[QuantizedLinear]) -> QuantizedLinear:
        """One layer for several that read the same input: its output is theirs side by side, without their biases.

        The codes move into it, and the given layers hold views of them; a single layer is its own.

        Args:
            layers: Of the same width, bits and group size.
        Raises:
            TypeError: They differ, or codes of 4 bits come in rows that torch's kernel cannot read side by side.
        """
        QuantizedLinear.check_join(layers)
        first = layers[0]
        if len(layers) == 1:
            return first
        axis = 1 if first.bits == 4 else 0  # of the rows in scales
        joint = QuantizedLinear.__new__(QuantizedLinear)
        nn.Module.__init__(joint)
        joint.out_features = sum(each.out_features for each in layers)
        joint.in_features, joint.bits, joint.group_size = first.in_features, first.bits, first.group_size
        joint.register_buffer("codes", torch.cat([each.codes for each in layers]))
        joint.register_buffer("scales", torch.cat([each.scales for each in layers], axis))
        joint.register_buffer("bias", None)
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
                f"a quantised layer has the layout of {before} and cannot be moved; move the model, then quantise it"
            )
        return cast(QuantizedLinear, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise CheckpointError(
            f"{prefix.rstrip('.') or 'this layer'} is quantised to {self.bits} bits, and quantised weights are not "
            "saved; save the model before quantising it"
        )


class QuantizedExperts(Experts):
    """Experts for CPUs whose weights have 8 or 4 bits: two ``QuantizedLinear`` each, gate and up in one.

    Args:
        experts: What to quantise, expert by expert.
        bits: See ``QuantizedLinear``.
        group_size: See ``QuantizedLinear``.
    Shape:
        See ``Experts``.
    Raises:
        ShapeError: As ``QuantizedLinear``.
    """

    def __init__(self, experts: Experts, bits: int = 4, group_size: int = 64) -> None:
        nn.Module.__init__(self)
        self.num_experts = experts.num_experts
        self.layers = nn.ModuleList(
            nn.ModuleList(
                QuantizedLinear(matrix, bits, group_size) for matrix in (torch.cat([gate, up]), down.t().contiguous())
            )
            for gate, up, down in zip(*(weight.detach().unbind() for weight in experts.matrices()), strict=True)
        )

    def run(self, rows: tuple[Tensor, ...]) -> list[Tensor]:
        """See ``Experts.run``.

        Shape:
            rows: (t, D) for each expert
            return: (t, D) for each expert with t > 0
        """
        outputs = []
        for x, layers in zip(rows, self.layers, strict=True):
            if len(x):
                gate_up, down = cast(nn.ModuleList, layers)
                gate, up = gate_up(x).chunk(2, dim=-1)
                outputs.append(down(F.silu(gate) * up))
        return outputs


def quantize(model: LlamaModel, bits: int = 4, group_size: int = 64, *, lm_head: bool = False) -> None:
    """Replace the linear layers and experts of a LLaMA by quantised ones, in place, one after the other.

    For inference only: on a CPU the new layers have no parameters, and the model's state dict can no longer be taken.
    Embeddings, norms and routers stay as they are. On CUDA torchao is needed: ``pip install "sphinxkit[quant]"``.

    Args:
        model: On the device where it will run, in the dtype that it will compute in (on CUDA with 4 bits: bfloat16).
        bits: 8 (about 1 % relative error in a layer's output) or 4 (about 10 %).
        group_size: Columns that share a scale with 4 bits: 32, 64, 128 or 256; smaller is more exact.
        lm_head: Whether to quantise the output matrix, too.
    Raises:
        ShapeError: ``bits`` or ``group_size`` is not offered, or a weight's size does not fit them; nothing is changed.
        TypeError: A layer is wrapped, sharded or quantised already, or the dtype does not fit; nothing is changed.
        DataError: The model is on another device than a CPU or CUDA, torchao is missing, or the model has
            experts and is on CUDA; nothing is changed.
    """
    _check_options(bits, group_size)
    owners = [part for layer in model.layers for part in (layer.get_submodule("attention"), layer.get_submodule("mlp"))]
    parts = [(owner, name, part) for owner in owners for name, part in owner.named_children() if name != "router"]
    found = [(owner, name, part) for owner, name, part in parts if not isinstance(part, RMSNorm)]
    if lm_head:
        found.append((model, "lm_head", model.lm_head))
    for _, name, part in found:
        if type(part) not in (nn.Linear, Experts) or any(type(p) is not nn.Parameter for p in part.parameters()):
            raise TypeError(f"only plain linear layers can be quantised, but {name} is {type(part).__name__}")
    device = _device_of(model)
    if device.type == "cuda":
        if model.moe is not None:
            raise DataError("quantisation: experts are quantised on a CPU only, the model is on CUDA")
        _quantize_by_torchao(model, [cast(nn.Linear, linear) for _, _, linear in found], bits, group_size)
    elif device.type == "cpu":
        with torch.device("meta"):  # checks the sizes
            for shape in (shape for _, _, part in found for shape in _matrix_shapes(part)):
                QuantizedLinear(torch.empty(shape), bits, group_size)
        for owner, name, part in found:
            if isinstance(part, Experts):
                setattr(owner, name, QuantizedExperts(part, bits, group_size))
            else:
                bias = None if part.bias is None else cast(Tensor, part.bias).detach()
                setattr(owner, name, QuantizedLinear(cast(Tensor, part.weight).detach(), bits, group_size, bias))
    else:
        raise DataError(f"quantisation: expected a model on a CPU or CUDA, got {device}")
    if model.accelerator is not None:
        model.accelerator.reset()


def _matrix_shapes(part: nn.Module) -> list[tuple[int, ...]]:
    if not isinstance(part, Experts):
        return [tuple(cast(Tensor, part.weight).shape)]
    _, hidden, dim = part.gate_proj.shape
    return [(2 * hidden, dim), (dim, hidden)]


def _device_of(model: LlamaModel) -> torch.device:
    return model.norm.weight.device


def _check_options(bits: int, group_size: int) -> None:
    if bits not in (4, 8):
        raise ShapeError(f"quantisation: bits must be 4 or 8, got {bits}")
    if bits == 4 and group_size not in GROUP_SIZES:
        raise ShapeError(f"quantisation: group_size must be one of {GROUP_SIZES}, got {group_size}")


def _quantize_by_torchao(model: LlamaModel, linears: Sequence[nn.Linear], bits: int, group_size: int) -> None:
    """Not yet run on CUDA here; 8 bits run on a CPU in the tests where torchao is installed."""
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise DataError('quantised weights on CUDA need torchao: pip install "sphinxkit[quant]"') from error
    config: Any
    if bits == 8:
        config = Int8WeightOnlyConfig(set_inductor_config=False)
    else:
        kinds = {linear.weight.dtype for linear in linears}
        if kinds != {torch.bfloat16}:
            raise TypeError(f"4 bits on CUDA need weights in torch.bfloat16, got {', '.join(map(str, kinds))}")
        misfit = next((linear for linear in linears if linear.in_features % group_size), None)
        if misfit is not None:
            raise ShapeError(
                f"quantisation: 4 bits need columns in multiples of {group_size}, got a weight of "
                f"{tuple(misfit.weight.shape)}"
            )
        # the layout of torch's own int4 kernel; torchao's default layout needs a further package
        config = Int4WeightOnlyConfig(group_size, set_inductor_config=False, int4_packing_format="tile_packed_to_4d")
    wanted = {id(linear) for linear in linears}
    quantize_(model, config, filter_fn=lambda module, _: id(module) in wanted)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of 8 bits: the largest number of each row is 127.

    Args:
        weight: A matrix.
    Shape:
        weight: (O, I)
        return: codes (O, I) int8; scales (O,) in the weight's dtype
    """
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
