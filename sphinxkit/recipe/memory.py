"""Predicts the memory for inference, before anything is loaded: ``sphinxkit.memory``."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sphinxkit.errors import DataError
from sphinxkit.llama.moe import Experts, MoEOptions
from sphinxkit.recipe.build import build
from sphinxkit.recipe.recipe import Recipe
from sphinxkit.registry import no_imports, suggest

GPU_GIGABYTES = {
    **{"t4": 16, "a10": 24, "l4": 24, "l40s": 48, "v100-16gb": 16, "v100-32gb": 32},
    **{"a100-40gb": 40, "a100-80gb": 80, "h100": 80, "h200": 141},
    **{"rtx3090": 24, "rtx4090": 24, "rtx5090": 32, "rtx6000-ada": 48},
}
"""Memory in 10^9 bytes, as NVIDIA's data sheets state it; a driver reports a little more."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Memory of a model in bytes, by purpose.

    Args:
        weights: Weights of each part.
        kv_cache: Keys and values of all rows.
        activations: Peak of a forward pass, without weights and cache.
        num_image_tokens: Tokens per image.
        experts: How much of the language model's weights is experts, all of which lie in memory.
        active: How much of the language model's weights computes a token.
    """

    weights: dict[str, int]
    kv_cache: int
    activations: int
    num_image_tokens: int
    experts: int
    active: int

    @property
    def total(self) -> int:
        """Sum of all purposes."""
        return sum(self.weights.values()) + self.kv_cache + self.activations

    def left_on(self, gpu: str) -> int:
        """Free bytes on a GPU; negative if the model does not fit.

        Args:
            gpu: One of ``GPU_GIGABYTES``.
        Raises:
            DataError: It is none of them.
        """
        return gpu_bytes(gpu) - self.total


def gpu_bytes(gpu: str) -> int:
    """The memory of a GPU by its name.

    Raises:
        DataError: The name is not known; the message lists the known ones.
    """
    if gpu not in GPU_GIGABYTES:
        hint = suggest(gpu, GPU_GIGABYTES) or f"; known: {', '.join(GPU_GIGABYTES)}"
        raise DataError(f"GPU {gpu!r} is not known{hint}")
    return GPU_GIGABYTES[gpu] * 10**9


def num_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def experts_of(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of every expert below a module."""
    return [weight for part in module.modules() if isinstance(part, Experts) for weight in part.parameters()]


def num_inactive(llm: nn.Module) -> int:
    """How many parameters of a language model compute nothing for a token: those of the experts not chosen."""
    moe = getattr(llm, "moe", None)
    if not isinstance(moe, MoEOptions):
        return 0
    return sum(p.numel() for p in experts_of(llm)) * (moe.num_experts - moe.num_experts_per_tok) // moe.num_experts


def parts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The user-visible parts by name: each encoder, the projectors, the language model."""
    parts: dict[str, nn.Module] = {}
    vision: Any = getattr(model, "vision", None)
    for i, branch in enumerate([] if vision is None else vision.branches):
        for encoder in branch.encoders:
            name = encoder.name if encoder.name not in parts else f"{encoder.name} (branch {i})"
            parts[name] = encoder
        parts[f"projector {i}"] = branch.projector
    parts["llm"] = model.get_submodule("llm")
    return parts


class PeakTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the bytes of every storage that operators make, and remembers the most that lived at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live: dict[int, int] = {}
        self._total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler, which takes as long as everything else here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in known | self._live.keys():
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self._live[key] = size
        self._total += size
        self.peak = max(self.peak, self._total)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self._total -= self._live.pop(key)


class FusedOperators(TorchFunctionMode):
    """Operators whose kernels hold nothing but their result give that result's shape at once.

    Fused attention does not hold its matrix of scores. The others are here because torch follows them on tensors
    without memory in Python, a hundred times slower than it counts their bytes.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and len(args) > 2:
            return args[0].new_empty((*args[0].shape[:-1], args[2].shape[-1]))
        if func in _LIKE_THEIR_INPUT and args:
            return args[0].new_empty(args[0].shape)
        if func is F.linear and len(args) > 1:
            return args[0].new_empty((*args[0].shape[:-1], args[1].shape[0]))
        if func is F.interpolate and kwargs is not None:
            scales = kwargs.get("scale_factor") or ()
            size = kwargs.get("size") or [int(n * s) for n, s in zip(args[0].shape[-2:], scales, strict=True)]
            return args[0].new_empty((*args[0].shape[:-2], *size))
        if func is F.conv2d and len(args) == 7 and args[5] == (1, 1) and isinstance(args[4], tuple):
            given, weight, _, strides, paddings = args[:5]
            sides = zip(given.shape[-2:], weight.shape[-2:], strides, paddings, strict=True)
            size = [(side + 2 * padding - kernel) // stride + 1 for side, kernel, stride, padding in sides]
            return given.new_empty((given.shape[0], weight.shape[0], *size))
        if func is torch.arange and all(isinstance(arg, int) for arg in args):
            options: dict[str, Any] = {"dtype": torch.int64} | dict(kwargs or {})
            return torch.empty(len(range(*args)), **options)
        if func is torch.cat:
            first, dim = args[0][0], (kwargs or {}).get("dim", args[1] if len(args) > 1 else 0)
            shape = list(first.shape)
            shape[dim] = sum(tensor.shape[dim] for tensor in args[0])
            return first.new_empty(shape)
        if func is Tensor.mean and kwargs is not None and kwargs.get("keepdim"):
            return args[0].new_empty(args[0].narrow(kwargs["dim"], 0, 1).shape)
        if func is torch.polar:
            return args[0].new_empty(args[0].shape, dtype=args[0].dtype.to_complex())
        if getattr(func, "__name__", "") in _ELEMENTWISE and not kwargs:
            return _elementwise(*args)
        return func(*args, **(kwargs or {}))


_LIKE_THEIR_INPUT = (F.layer_norm, F.rms_norm, F.gelu, F.silu, torch.sigmoid, torch.full_like)
_ELEMENTWISE = frozenset(
    {
        *("mul", "__mul__", "__rmul__", "add", "__add__", "__radd__", "sub", "__sub__"),
        *("div", "__truediv__", "__rdiv__", "__rtruediv__", "pow", "__pow__", "__rpow__", "__floordiv__"),
    }
)
"""Operators whose result has their operands' common shape and dtype; quotients are of floating-point numbers here."""


def _elementwise(*operands: Tensor | float) -> Tensor:
    tensors = [operand for operand in operands if isinstance(operand, Tensor)]
    deciding = [tensor for tensor in tensors if tensor.ndim] or tensors  # a scalar keeps the others' width
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in deciding))
    sizes = itertools.zip_longest(*(reversed(tensor.shape) for tensor in tensors), fillvalue=1)
    return tensors[0].new_empty([max(pair) for pair in sizes][::-1], dtype=dtype)


def peak_bytes(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, **options: Any) -> int:
    """Peak activation memory of a module on the meta device for an input; nothing is computed.

    Args:
        module: On the meta device.
        shape: Of the input, which is not counted.
        dtype: Of the input.
        options: Of the call.
    """
    given = torch.empty(shape, dtype=dtype, device="meta")
    with torch.no_grad(), PeakTracker() as tracker, FusedOperators():
        module(given, **options)
    peak: int = tracker.peak
    return peak


def memory(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 1,
    text_tokens: int = 512,
    images: int | None = None,
    trust: bool = False,
) -> MemoryEstimate:
    """Predict the memory for answering a batch: weights, KV cache and peak activations.

    Activations are found by tracing the real model on tensors without memory, with fused attention. Allocator overhead
    (rounding, fragments, library workspaces) is not included. For training see
    ``sphinxkit.training.memory.estimate_training``.

    Args:
        recipe: Of kind ``model``: a shipped name, a path, a dict or a Recipe.
        dtype: Of weights, cache and activations. (On a CPU a 16-bit model keeps its cache in float32, twice of this.)
        batch_size: Rows answered together.
        text_tokens: Prompt and answer of a row, in tokens, without the image.
        images: Images in the batch; None: one for each row, unless the model is text-only.
        trust: Whether code that the recipe names (``package.module:builder``) may be imported and called.

    Raises:
        RecipeError: The recipe is not a valid model, or names code without ``trust``.
        DataError: A count is out of range, or a row does not fit the context.
    """
    with nullcontext() if trust else no_imports():
        model = build(recipe, device="meta", dtype=dtype)
    count = (0 if model.vision is None else batch_size) if images is None else images
    if batch_size < 1 or text_tokens < 1 or not 0 <= count <= batch_size or (count and model.vision is None):
        raise DataError(f"memory: cannot answer {batch_size} rows of {text_tokens} tokens with {count} images")
    image_tokens = 0 if model.vision is None else model.vision.num_tokens
    row = text_tokens + (image_tokens if count else 0)
    if row > model.llm.max_seq_len:
        raise DataError(
            f"memory: a row of {text_tokens} text and {row - text_tokens} image tokens is longer than the context of "
            f"{model.llm.max_seq_len}"
        )
    width = model.llm.embed_dim
    peak = peak_bytes(model.llm, (batch_size, row, width), dtype, output_positions=slice(-1, None))
    peak += batch_size * row * width * dtype.itemsize  # the embedded prompt itself
    if count and model.vision is not None:
        size = model.vision.image_size
        peak = max(peak, peak_bytes(model.vision, (count, 3, size, size), torch.float32))
    weights = {name: num_bytes(part) for name, part in parts_of(model).items()}
    return MemoryEstimate(
        weights=weights,
        kv_cache=model.llm.make_cache(batch_size, row, device="meta", dtype=dtype).num_bytes,
        activations=peak,
        num_image_tokens=image_tokens,
        experts=sum(weight.nbytes for weight in experts_of(model.llm)),
        active=weights["llm"] - num_inactive(model.llm) * dtype.itemsize,
    )
