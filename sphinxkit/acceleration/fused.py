"""The decoder layers for inference: joint projections, plain tensors, no module calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphinxkit.acceleration.cpu import gemv, huge_pages
from sphinxkit.acceleration.cpu.gemv import Gemv
from sphinxkit.acceleration.cpu.probe import find_gemv
from sphinxkit.acceleration.ops import PLAIN, FusedOps
from sphinxkit.acceleration.quantization import QuantizedLinear
from sphinxkit.acceleration.snapshot import Snapshot, storage_uses
from sphinxkit.llama.attention import AttentionContext, attend
from sphinxkit.llama.block import LlamaBlock
from sphinxkit.llama.layers import RMSNorm, SwiGLU
from sphinxkit.llama.model import LlamaModel
from sphinxkit.llama.rope import rotate_pairs

Weight = Tensor | QuantizedLinear
Product = Callable[[Tensor, Weight, FusedOps], Tensor]

# Weights from which on a kernel is compiled. That takes a second, and reading so many of 16 bits 2 ms less than
# by torch: worth it after a few hundred tokens. Our choice.
COMPILE_BYTES = 48 << 20


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """Weights of one layer; q, k, v and gate, up stacked."""

    qkv_ops: FusedOps  # the norm
    qkv: Weight
    o: Weight
    gate_up_ops: FusedOps  # the norm and the gate
    gate_up: Weight
    down: Weight
    num_heads: int
    num_kv_heads: int
    biases: tuple[Tensor, ...]  # of q, k and v; the modules' own memory
    head_norms: tuple[RMSNorm, RMSNorm] | None  # of each head's query and key

    def add_biases(self, qkv: Tensor) -> Tensor:
        """Shape: qkv, return: (B, S, channels of q, k and v)."""
        return qkv + torch.cat(self.biases) if self.biases else qkv

    def normalize_heads(self, qkv: Tensor) -> Tensor:
        """Queries and keys (B, S, heads, D) normalised, values behind them as they are."""
        if self.head_norms is None:
            return qkv
        q, k, v = torch.split(qkv, [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=2)
        return torch.cat([self.head_norms[0](q), self.head_norms[1](k), v], dim=2)

    def weights(self) -> list[Weight]:
        norms = (self.qkv_ops.norm, self.gate_up_ops.norm)
        return [*(norm for norm in norms if norm is not None), self.qkv, self.o, self.gate_up, self.down]


class FusedLayers:
    """All decoder layers as one function, computing what the modules compute (with 8 bits see ``QuantizedLinear``).

    The weights of q, k and v move next to each other in memory, and so do gate and up: one matrix product reads each
    group, and the modules' parameters look at the same memory; on a CPU what has no codes moves to large pages. Names,
    shapes and values of the state dict stay as they are, and values changed in place are seen. A layer exists twice
    only while it is moved. Over a cache in float32 a 16-bit model does not round rotated queries and keys on their way
    there.

    Args:
        model: In eval mode, its layers as ``LlamaModel`` makes them: ``nn.Linear`` or ``QuantizedLinear`` all through.
        use_gemv: On a CPU let ``gemv.c`` do the products of up to 32 rows with bfloat16, float32 or 8-bit weights, from
            ``COMPILE_BYTES`` on, where it works.
    Raises:
        TypeError: A weight is sharded or a tensor of another kind, another tensor shares its memory, or only some
            layers are quantised; then nothing has moved.
    """

    def __init__(self, model: LlamaModel, *, use_gemv: bool = True) -> None:
        layers = [cast(LlamaBlock, layer) for layer in model.layers]
        self.is_quantized = _check_layers(layers)
        with torch.no_grad(), torch.inference_mode(False):  # what is moved must stay usable in training
            self._layers = [_fuse(layer, model.head_dim, self.is_quantized) for layer in layers]
            self._move_head(model.lm_head)
        self._head_dim = model.head_dim
        self._head = _head_weight(model.lm_head)
        weights = [weight for layer in self._layers for weight in layer.weights()]
        self._gemv = _gemv_for(weights) if use_gemv else None
        self._head_gemv = _gemv_for([self._head], self._gemv) if use_gemv and self._head is not None else None
        self.snapshot = Snapshot(model, (model.embed_tokens, model.norm))

    def __call__(self, x: Tensor, context: AttentionContext) -> Tensor:
        """Apply all layers. Records no gradient for the joint weights: for inference only.

        Shape:
            x: (B, S, D)
            return: (B, S, D)
        """
        head_dim, grid = self._head_dim, x.shape[:2]
        kernel = self._gemv if _suits_gemv(x, self._layers[0].qkv) else None
        multiply: Product = _multiply if kernel is None else functools.partial(_multiply_rows, kernel)
        reads_cache = context.cache is not None and context.pattern.write is not None
        widens = reads_cache and context.cache is not None and context.cache.dtype == torch.float32
        for index, layer in enumerate(self._layers):
            heads, groups = layer.num_heads, layer.num_kv_heads
            qkv = layer.add_biases(multiply(x, layer.qkv, layer.qkv_ops)).view(*grid, heads + 2 * groups, head_dim)
            qkv = layer.normalize_heads(qkv)
            turned = heads + groups
            if widens or qkv.dtype == torch.float32:  # where the rotation happens anyway
                qkv = qkv.float()
                rotated = _rotate(qkv[:, :, :turned], context.freqs_cis)
            else:
                rotated = _rotate(qkv[:, :, :turned].float(), context.freqs_cis).to(qkv.dtype)
            q, k, v = rotated[:, :, :heads], rotated[:, :, heads:], qkv[:, :, turned:]
            x = x + multiply(attend(q, k, v, context, index).to(x.dtype), layer.o, PLAIN)
            x = x + multiply(multiply(x, layer.gate_up, layer.gate_up_ops), layer.down, PLAIN)
        return x

    def project(self, x: Tensor, lm_head: nn.Module) -> Tensor:
        """``lm_head(x)``, by the kernel for few rows where that fits.

        Shape:
            x: (B, S, D)
            return: (B, S, V)
        """
        if self._head_gemv is not None and self._head is not None and _suits_gemv(x, self._head):
            return _multiply_rows(self._head_gemv, x, self._head, PLAIN)
        out: Tensor = lm_head(x)
        return out

    def tensors(self) -> list[Tensor]:
        """The joint weights and the norms, or quantised codes and scales."""
        weights = [weight for layer in self._layers for weight in layer.weights()]
        pairs = [(each.codes, each.scales) if isinstance(each, QuantizedLinear) else (each,) for each in weights]
        return [tensor for pair in pairs for tensor in pair]

    @staticmethod
    def _move_head(lm_head: nn.Module) -> None:
        """To large pages, if nothing else looks at its memory."""
        weight = _head_weight(lm_head)
        if isinstance(weight, Tensor) and weight.device.type == "cpu" and storage_uses(weight) == 2:
            memory = huge_pages.empty(weight.numel(), weight.dtype).view(weight.shape)
            lm_head.get_parameter("weight").data = memory.copy_(weight)


def _check_layers(layers: Sequence[LlamaBlock]) -> bool:
    """Whether all linear layers are quantised; raises where they cannot be joined, before anything is moved."""
    kinds, seen = set(), set()
    for layer in layers:
        parts = [*layer.attention.named_children(), *layer.mlp.named_children()]
        linears = [(name, part) for name, part in parts if not isinstance(part, RMSNorm)]
        kinds |= {isinstance(linear, QuantizedLinear) for _, linear in linears}
        plain = [(name, linear.weight) for name, linear in linears if isinstance(linear, nn.Linear)]
        for name, weight in plain:
            if type(weight) is not nn.Parameter or weight.is_inference():
                raise TypeError(f"only plain weights can be joined, but that of {name} is {type(weight).__name__}")
            together = [
                other for _, other in plain if other.untyped_storage()._cdata == weight.untyped_storage()._cdata
            ]
            if weight.device.type == "cpu" and weight.is_shared():  # type: ignore[no-untyped-call]
                raise TypeError(f"the weight of {name} is in memory shared with other processes")
            if storage_uses(weight) > len(together) or id(weight) in seen:
                raise TypeError(f"another tensor shares the memory of the weight of {name}")
            seen.add(id(weight))
        if all(isinstance(linear, QuantizedLinear) for _, linear in linears):
            for group in _groups(layer):
                QuantizedLinear.check_join(cast(list[QuantizedLinear], group))
    if len(kinds) > 1:
        raise TypeError("only some linear layers are quantised; all of them can be joined, or none")
    return kinds == {True}


def _groups(layer: LlamaBlock) -> list[list[nn.Module]]:
    """The linear layers that read the same input."""
    attention, mlp = layer.attention, cast(SwiGLU, layer.mlp)  # experts are not joined
    return [
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    ]


def _fuse(layer: LlamaBlock, head_dim: int, is_quantized: bool) -> _Layer:
    groups, attention = _groups(layer), layer.attention
    joints: Sequence[Weight]
    if is_quantized:
        joints = [QuantizedLinear.join(cast(list[QuantizedLinear], group)) for group in groups]
    else:
        joints = _join(cast(list[list[nn.Linear]], groups))
    qkv, o, gate_up, down = joints
    return _Layer(
        qkv_ops=FusedOps(layer.attention_norm.weight.detach(), layer.attention_norm.eps),
        qkv=qkv,
        o=o,
        gate_up_ops=FusedOps(layer.mlp_norm.weight.detach(), layer.mlp_norm.eps, gated=True),
        gate_up=gate_up,
        down=down,
        num_heads=layer.attention.q_proj.out_features // head_dim,
        num_kv_heads=layer.attention.k_proj.out_features // head_dim,
        biases=tuple(part.bias.detach() for part in groups[0] if isinstance(part.bias, Tensor)),
        head_norms=None
        if attention.q_norm is None or attention.k_norm is None
        else (attention.q_norm, attention.k_norm),
    )


def _join(groups: Sequence[Sequence[nn.Linear]]) -> list[Tensor]:
    """Move the weights of each group of layers into one matrix, (sum of rows, D), and make them look at it."""
    weights = [linear.weight.detach() for group in groups for linear in group]
    region: huge_pages.Region | None = None
    if {(weight.device.type, weight.dtype) for weight in weights} == {("cpu", weights[0].dtype)}:
        region = huge_pages.Region(sum(weight.numel() for weight in weights), weights[0].dtype)
    joints, start = [], 0
    for group in groups:
        parts = [linear.weight.detach() for linear in group]
        size = sum(part.numel() for part in parts)
        if region is None:
            joint = torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
            places = list(torch.split(joint, [len(part) for part in parts]))
        else:
            joint = region.tensor(start, size).view(-1, parts[0].shape[1])
            torch.cat(parts, out=joint)
            places = []
            for part in parts:  # each with a storage of its own, for copies and pickles
                places.append(region.tensor(start, part.numel()).view(part.shape))
                start += part.numel()
        for linear, place in zip(group, places, strict=True):
            linear.weight.data = place  # the parameter stays the same object
        joints.append(joint)
    return joints


def _head_weight(lm_head: nn.Module) -> Weight | None:
    """The weight of ``lm_head``, if it is contiguous floats or 8-bit codes; otherwise None."""
    if type(lm_head) is QuantizedLinear:
        return lm_head if lm_head.bits == 8 else None
    if type(lm_head) is not nn.Linear or type(lm_head.weight) is not nn.Parameter or lm_head.weight.is_inference():
        return None
    is_alone = lm_head._parameters["bias"] is None
    return lm_head.weight.detach() if is_alone and lm_head.weight.is_contiguous() else None


def _gemv_for(weights: Sequence[Weight], found: Gemv | None = None) -> Gemv | None:
    """The kernel that can multiply with all weights, if it works, and compiling it is worth it or done (``found``)."""
    pairs = [(each.codes, each.scales) if isinstance(each, QuantizedLinear) else (each,) for each in weights]
    tensors = [tensor for pair in pairs for tensor in pair]
    kinds = {(tensor.device.type, tensor.dtype, tensor.is_contiguous()) for tensor in tensors}
    coded = ("cpu", torch.int8, True) in kinds
    kinds.discard(("cpu", torch.int8, True))  # codes of 8 bits, as those of 4 have another dtype
    dtype = next((dtype for dtype in gemv.DTYPES if kinds == {("cpu", dtype, True)}), None)
    if dtype is None:
        return None
    if found is not None and (found.dtype, found.coded) == (dtype, coded):
        return found
    return find_gemv(dtype, coded) if sum(tensor.nbytes for tensor in tensors) >= COMPILE_BYTES else None


def _suits_gemv(x: Tensor, weight: Weight) -> bool:
    """Whether the kernel can read ``x`` (B, S, D) beside a weight that it is for."""
    numbers = weight.scales if isinstance(weight, QuantizedLinear) else weight
    return (
        type(x) is Tensor  # a tensor that only stands for one has no memory
        and 0 < x.shape[0] * x.shape[1] <= gemv.MAX_ROWS
        and (x.device, x.dtype) == (numbers.device, numbers.dtype)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


def _multiply(x: Tensor, weight: Weight, ops: FusedOps) -> Tensor:
    """By torch's operators."""
    x = ops.before(x)
    return ops.after(weight.forward(x) if isinstance(weight, QuantizedLinear) else F.linear(x, weight))


def _multiply_rows(kernel: Gemv, x: Tensor, weight: Weight, ops: FusedOps) -> Tensor:
    """A few rows by the kernel."""
    if isinstance(weight, QuantizedLinear):
        buffers = cast(dict[str, Tensor], weight._buffers)  # nn.Module.__getattr__ takes long
        return kernel(x, buffers["codes"], ops, buffers["scales"])
    return kernel(x, weight, ops)


def _rotate(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """``apply_rope`` of float32 queries and keys, in place where ``freqs_cis`` are complex."""
    if not freqs_cis.is_complex():
        return rotate_pairs(x, freqs_cis)
    torch.view_as_complex(x.view(*x.shape[:-1], -1, 2)).mul_(freqs_cis)
    return x
