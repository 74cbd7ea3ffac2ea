"""The decoder layers for inference: joint projections, plain tensors, no module calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphinxkit.llama import cpu_rows, huge_pages
from sphinxkit.llama.attention import Attention, AttentionContext, attend, attend_to_cache
from sphinxkit.llama.backends import HALF_DTYPES
from sphinxkit.llama.cache import KVCache
from sphinxkit.llama.kernels import PLAIN, RowFusion, find_kernels, find_rows
from sphinxkit.llama.layers import SwiGLU, rotate_pairs
from sphinxkit.llama.quantization import QuantizedLinear

Weight = Tensor | QuantizedLinear
Product = Callable[[Tensor, Any, RowFusion], Tensor]

# Rows that the packed layout is chosen for, and up to which ``cpu_rows`` is faster (measured on Zen 4): our choice.
PACK_ROWS = 8
# Weights from which on a kernel is compiled. That takes a second, and reading so many of 16 bits 2 ms less than
# by torch: worth it after a few hundred tokens. Our choice.
COMPILE_BYTES = 48 << 20


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """Weights of one layer; q, k, v and gate, up stacked."""

    qkv_fusion: RowFusion  # the norm
    qkv: Weight
    o: Weight
    gate_up_fusion: RowFusion  # the norm and the gate
    gate_up: Weight
    down: Weight
    num_heads: int
    num_kv_heads: int


class FusedLayers:
    """All decoder layers as one function, computing what the modules compute (with 8 bits see ``QuantizedLinear``).

    The weights of q, k and v move next to each other in memory, and so do gate and up: one matrix product reads each
    group, and the modules' parameters are views of the same memory; on a CPU what has no codes moves to large pages.
    Names, shapes and values of the state dict stay as they are; a layer exists twice only while it is moved. A decoding
    step of a small model costs about a third fewer calls into torch, and no calls of modules (whose hooks it does not
    run). Over a cache in float32 a 16-bit model does not round rotated queries and keys on their way there.

    Args:
        layers: ``LlamaModel.layers``, plain ``nn.Linear`` or ``QuantizedLinear`` all through.
        norm_eps: Of every norm.
        head_dim: Channels of a head.
        pack: Multiply more than ``PACK_ROWS`` rows with copies in oneDNN's layout (CPU, 16 bit): memory for the layers
            twice.
        kernels: On CUDA in 16 bit, let ``triton_kernels`` do what stands between the products, and ``triton_rows`` or
            ``triton_quantized`` the products of a single row with it; on a CPU let ``cpu_rows`` do the products of a
            few rows with weights that do not have 4 bits, from ``COMPILE_BYTES`` on. Where they work.
    Raises:
        TypeError: A linear layer is wrapped or sharded, only some are quantised, or its weight is not what ``pack`` is
            for.
    """

    def __init__(
        self, layers: Sequence[nn.Module], norm_eps: float, head_dim: int, *, pack: bool = False, kernels: bool = True
    ) -> None:
        self._modules = list(layers)
        self._head_dim = head_dim
        self.wants_kernels = kernels
        self._layers = [_fuse(layer, norm_eps, head_dim, pack) for layer in self._modules]
        kinds = {isinstance(layer.qkv, QuantizedLinear) for layer in self._layers}
        self._is_quantized = kinds == {True}
        if len(kinds) > 1:
            raise TypeError("only some layers are quantised; they can be fused all together")
        self._packed = [_packed(layer) for layer in self._layers] if pack else None
        self._addresses = [weight.data_ptr() for weight in self._weights()]
        self._suits_rows = _suit_rows([weight for layer in self._layers for weight in _operands(layer)])

    @property
    def is_packed(self) -> bool:
        """Whether copies in oneDNN's layout are kept."""
        return self._packed is not None

    def _weights(self) -> list[Tensor]:
        # through the dictionaries: nn.Module.__getattr__ would take most of a step's Python time here
        return [weight for layer in self._modules for weight in _weights(layer)]

    def is_current(self) -> bool:
        """Whether the modules still hold the weights that were joined.

        They do not after ``to``, ``load_state_dict(assign=True)``, or wrapping or replacing a linear layer. Changes of
        values in place are seen by both, except where weights are packed.
        """
        return self._addresses == [weight.data_ptr() for weight in self._weights()]

    def __call__(self, x: Tensor, step: AttentionContext) -> Tensor:
        """Apply all layers to ``x`` (B, S, D). Records no gradient for the joined weights: for inference only."""
        head_dim, grid = self._head_dim, x.shape[:2]
        kernels = find_kernels(x.device) if self.wants_kernels and _can_use_kernels(x) else None
        if kernels is not None:
            return self._through_kernels(x.contiguous(), step, kernels)
        limit = cpu_rows.MAX_ROWS if self._packed is None else PACK_ROWS
        rows = self._find_rows(x, self._layers[0].qkv, limit) if self._suits_rows else None
        multiply: Product = _multiply if rows is None else functools.partial(_multiply_rows, rows)
        layers = self._layers if rows is not None or self._packed is None else self._packed
        widens = step.cache is not None and step.pattern.step is not None and step.cache.dtype == torch.float32
        for index, layer in enumerate(layers):
            heads, groups = layer.num_heads, layer.num_kv_heads
            qkv = multiply(x, layer.qkv, layer.qkv_fusion).view(*grid, heads + 2 * groups, head_dim)
            turned = heads + groups
            if widens or qkv.dtype == torch.float32:  # where the rotation happens anyway
                qkv = qkv.float()
                rotated = _rotate(qkv[:, :, :turned], step.freqs_cis)
            else:
                rotated = _rotate(qkv[:, :, :turned].float(), step.freqs_cis).to(qkv.dtype)
            q, k, v = rotated[:, :, :heads], rotated[:, :, heads:], qkv[:, :, turned:]
            x = x + multiply(attend(q, k, v, step, index).to(x.dtype), layer.o, PLAIN)
            x = x + multiply(multiply(x, layer.gate_up, layer.gate_up_fusion), layer.down, PLAIN)
        return x

    def project(self, x: Tensor, linear: nn.Module) -> Tensor:
        """``linear(x)``, as the layers multiply if it is a linear layer and nothing else: for ``lm_head``.

        Args:
            x: (B, S, D)
            linear: Any module.
        """
        weight = _multiplied_with(linear) if x.is_cpu else None
        if weight is not None:
            is_alike = isinstance(weight, QuantizedLinear) == self._is_quantized
            rows = self._find_rows(x, weight) if (is_alike and self._suits_rows) or _suit_rows([weight]) else None
            if rows is not None:
                return _multiply_rows(rows, x, weight)
        out: Tensor = linear(x)
        return out

    def _find_rows(self, x: Tensor, weight: Weight, limit: int = cpu_rows.MAX_ROWS) -> cpu_rows.CpuRows | None:
        """The kernel for ``x`` (B, S, D) and weights like this one, if it is for them and so many rows."""
        if self.wants_kernels and 0 < x.shape[0] * x.shape[1] <= limit and _can_use_rows(x, weight):
            return find_rows(x.dtype, isinstance(weight, QuantizedLinear))
        return None

    def _through_kernels(self, x: Tensor, step: AttentionContext, kernels: Any) -> Tensor:
        """The same with fewer and larger kernels; ``x`` is contiguous."""
        cache = step.cache if step.pattern.is_token() and isinstance(step.cache, KVCache) else None
        if cache is not None and len(x) == 1:
            quantized = isinstance(self._layers[0].qkv, QuantizedLinear)
            products = find_kernels(x.device, "quantized" if quantized else "rows")
            if products is not None:
                return self._row_through_kernels(x, step, cache, kernels, products)
        added: Tensor | None = None
        for index, layer in enumerate(self._layers):
            heads, turned = layer.num_heads, layer.num_heads + layer.num_kv_heads
            x, normed = kernels.add_rms_norm(x, added, layer.qkv_fusion.norm, layer.qkv_fusion.eps)
            qkv = _linear(normed, layer.qkv).view(*x.shape[:2], turned + layer.num_kv_heads, self._head_dim)
            if cache is not None:
                places = (cache.lengths, cache.keys[index], cache.values[index])
                attended = attend_to_cache(kernels.rotate_and_store(qkv, step.freqs_cis, *places), step, index)
            else:
                rotated = _rotate(qkv[:, :, :turned].float(), step.freqs_cis).to(qkv.dtype)
                attended = attend(rotated[:, :, :heads], rotated[:, :, heads:], qkv[:, :, turned:], step, index)
            added = _linear(attended.to(x.dtype), layer.o)
            x, normed = kernels.add_rms_norm(x, added, layer.gate_up_fusion.norm, layer.gate_up_fusion.eps)
            added = _linear(kernels.silu_mul(_linear(normed, layer.gate_up)), layer.down)
        return x if added is None else x + added

    def _row_through_kernels(
        self, x: Tensor, step: AttentionContext, cache: KVCache, kernels: Any, products: Any
    ) -> Tensor:
        """One token of one row: what stands between the products but attention is part of them."""
        for index, layer in enumerate(self._layers):
            heads = layer.num_heads + 2 * layer.num_kv_heads
            qkv = _multiply_row(products, x, layer.qkv, layer.qkv_fusion)
            qkv = qkv.view(1, 1, heads, self._head_dim)
            places = (cache.lengths, cache.keys[index], cache.values[index])
            attended = attend_to_cache(kernels.rotate_and_store(qkv, step.freqs_cis, *places), step, index)
            x = _multiply_row(products, attended.to(x.dtype), layer.o, RowFusion(residual=x))
            gated = _multiply_row(products, x, layer.gate_up, layer.gate_up_fusion)
            x = _multiply_row(products, gated, layer.down, RowFusion(residual=x))
        return x


def _multiply(x: Tensor, weight: Weight, fusion: RowFusion) -> Tensor:
    """By torch's operators, with the norm and the gate of ``fusion``."""
    if fusion.norm is not None:
        x = F.rms_norm(x, x.shape[-1:], None, fusion.eps) * fusion.norm
    out = _linear(x, weight)
    if not fusion.gated:
        return out
    gate, up = out.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _multiply_rows(rows: cpu_rows.CpuRows, x: Tensor, weight: Weight, fusion: RowFusion = PLAIN) -> Tensor:
    """A few rows by ``cpu_rows``."""
    if isinstance(weight, QuantizedLinear):
        buffers = cast(dict[str, Tensor], weight._buffers)  # nn.Module.__getattr__ takes long
        return rows.linear_rows(x, buffers["codes"], fusion, buffers["scales"])
    return rows.linear_rows(x, weight, fusion)


def _multiply_row(products: Any, x: Tensor, weight: Weight, fusion: RowFusion) -> Tensor:
    """One row times a weight by ``triton_rows`` or ``triton_quantized``."""
    out: Tensor
    if isinstance(weight, QuantizedLinear):
        buffers = weight._buffers  # nn.Module.__getattr__ takes long
        packed = (buffers["codes"], buffers["scales"], weight.bits, weight.group_size)
        out = products.quantized_row(x.contiguous(), *packed, fusion)
    else:
        out = products.linear_row(x.contiguous(), weight, fusion)
    return out


def _can_use_kernels(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in HALF_DTYPES and not torch.compiler.is_compiling()


def _multiplied_with(linear: nn.Module) -> Weight | None:
    """What calling a module multiplies with, if it is contiguous numbers or codes of 8 bits, and does nothing else."""
    if "forward" in vars(linear) or linear._forward_hooks or linear._forward_pre_hooks:
        return None
    if type(linear) is QuantizedLinear:
        return linear if linear.bits == 8 else None
    if type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter or not linear.weight.is_contiguous():
        return None
    learns = torch.is_grad_enabled() and linear.weight.requires_grad
    return None if learns or linear._parameters["bias"] is not None else linear.weight.detach()


def _operands(layer: _Layer) -> list[Weight]:
    norms = (layer.qkv_fusion.norm, layer.gate_up_fusion.norm)
    return [*(norm for norm in norms if norm is not None), layer.qkv, layer.o, layer.gate_up, layer.down]


def _suit_rows(weights: Sequence[Weight]) -> bool:
    """Whether ``cpu_rows`` can multiply with all of them, and it is worth compiling."""
    pairs = [(each.codes, each.scales) if isinstance(each, QuantizedLinear) else (each,) for each in weights]
    tensors = [tensor for pair in pairs for tensor in pair]
    kinds = {(tensor.device.type, tensor.dtype, tensor.is_contiguous()) for tensor in tensors}
    kinds.discard(("cpu", torch.int8, True))  # codes of 8 bits, as those of 4 have another dtype
    fits = any(kinds == {("cpu", dtype, True)} for dtype in cpu_rows.DTYPES)
    return fits and sum(tensor.nbytes for tensor in tensors) >= COMPILE_BYTES


def _can_use_rows(x: Tensor, weight: Weight) -> bool:
    numbers = weight.scales if isinstance(weight, QuantizedLinear) else weight
    return (
        type(x) is Tensor  # a tensor that only stands for one has no memory
        and (x.device, x.dtype) == (numbers.device, numbers.dtype)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


def _rotate(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """``layers.apply_rope`` of float32 queries and keys, in place where the freqs_cis are complex."""
    if not freqs_cis.is_complex():
        return rotate_pairs(x, freqs_cis)
    torch.view_as_complex(x.view(*x.shape[:-1], -1, 2)).mul_(freqs_cis)
    return x


def _linear(x: Tensor, weight: Weight) -> Tensor:
    if isinstance(weight, QuantizedLinear):
        return weight.forward(x)
    if weight.is_mkldnn:
        packed: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return packed
    return F.linear(x, weight)


def _packed(layer: _Layer) -> _Layer:
    """The same with weights in oneDNN's layout."""
    qkv, o, gate_up, down = (_pack(cast(Tensor, each)) for each in (layer.qkv, layer.o, layer.gate_up, layer.down))
    return replace(layer, qkv=qkv, o=o, gate_up=gate_up, down=down)


def _pack(weight: Tensor) -> Tensor:
    """A copy in the layout that oneDNN's matrix product reads: it need not reorder it at each call."""
    if weight.device.type != "cpu" or weight.dtype not in HALF_DTYPES:
        raise TypeError(f"only 16-bit weights on a CPU can be packed, got {weight.dtype} on {weight.device}")
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, PACK_ROWS)
    return packed


def _weights(layer: nn.Module) -> list[Tensor]:
    parts = layer._modules
    attention, mlp = parts["attention"], parts["mlp"]
    owners = [parts["attention_norm"], parts["mlp_norm"]]
    for module in (attention, mlp):
        owners.extend(() if module is None else module._modules.values())
    found = [owner._parameters.get("weight", owner._buffers.get("codes")) for owner in owners if owner is not None]
    return [weight for weight in found if weight is not None]


@torch.no_grad()
def _fuse(layer: nn.Module, norm_eps: float, head_dim: int, pack: bool) -> _Layer:
    attention, mlp = layer.get_submodule("attention"), layer.get_submodule("mlp")
    if not isinstance(attention, Attention) or not isinstance(mlp, SwiGLU):
        raise TypeError(f"expected a LLaMA layer, got {type(attention).__name__} and {type(mlp).__name__}")
    linears = [*attention.named_children(), *mlp.named_children()]
    is_quantized = all(type(linear) is QuantizedLinear for _, linear in linears) and not pack
    for name, linear in linears:
        if not is_quantized and (type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter):
            weight = getattr(linear, "weight", None)
            raise TypeError(
                f"only plain linear layers can be fused, but {name} is {type(linear).__name__} with a weight of type "
                f"{type(weight).__name__} (quantised ones can be too, all together and without pack)"
            )
    groups = [
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    ]
    joints: Sequence[Weight]
    if is_quantized:
        joints = [QuantizedLinear.join(cast(list[QuantizedLinear], group)) for group in groups]
    else:
        joints = [joint.detach() for joint in _join(groups)]
    qkv, o, gate_up, down = joints
    return _Layer(
        qkv_fusion=RowFusion(layer.get_parameter("attention_norm.weight").detach(), norm_eps),
        qkv=qkv,
        o=o,
        gate_up_fusion=RowFusion(layer.get_parameter("mlp_norm.weight").detach(), norm_eps, gated=True),
        gate_up=gate_up,
        down=down,
        num_heads=attention.q_proj.out_features // head_dim,
        num_kv_heads=attention.k_proj.out_features // head_dim,
    )


def _join(groups: Sequence[Sequence[nn.Linear]]) -> list[Tensor]:
    """Move the weights of each group of layers into one matrix, (sum of rows, D), and make them views of it."""
    weights = [linear.weight.detach() for group in groups for linear in group]
    memory: Tensor | None = None
    if {(weight.device.type, weight.dtype) for weight in weights} == {("cpu", weights[0].dtype)}:
        memory = huge_pages.empty(sum(weight.numel() for weight in weights), weights[0].dtype)
    joints = []
    for group in groups:
        parts = [linear.weight.detach() for linear in group]
        if memory is not None:
            size = sum(part.numel() for part in parts)
            joint, memory = memory[:size].view(-1, parts[0].shape[1]), memory[size:]
            torch.cat(parts, out=joint)
        else:
            joint = torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
        start = 0
        for linear in group:
            rows = linear.weight.shape[0]
            linear.weight.data = joint[start : start + rows]  # the parameter stays the same object
            start += rows
        joints.append(joint)
    return joints
