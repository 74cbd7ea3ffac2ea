"""How much memory a model will take, before anything is loaded."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sphinxkit.errors import DataError
from sphinxkit.recipe.build import build
from sphinxkit.recipe.recipe import Recipe


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes that a model takes, by purpose.

    Args:
        weights: Of each part.
        kv_cache: Keys and values of every row.
        activations: The most that a forward pass holds at once beside weights and cache.
        num_image_tokens: Of one image.
    """

    weights: dict[str, int]
    kv_cache: int
    activations: int
    num_image_tokens: int

    @property
    def total(self) -> int:
        """Everything at once."""
        return sum(self.weights.values()) + self.kv_cache + self.activations


def num_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def parts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The parts that a user thinks of, by name: each encoder, the projectors, the language model."""
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


def _peak_bytes(module: nn.Module, *shapes: tuple[tuple[int, ...], torch.dtype], **options: Any) -> int:
    """The most that ``module`` holds beside its weights for inputs of these shapes; nothing is computed."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        state = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype)
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
        }
        inputs = [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]
        with PeakTracker() as tracker:
            torch.func.functional_call(module, state, tuple(inputs), options)
    peak: int = tracker.peak
    return peak


def estimate_memory(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 1,
    text_tokens: int = 512,
    images: int | None = None,
) -> MemoryEstimate:
    """Predict what answering a batch takes: weights, KV cache and the peak of the activations.

    The activations are found by following every operator of the real model on tensors without memory, with fused
    attention; what an allocator adds (rounding, fragments, library workspaces) is not in it.

    Args:
        recipe: Of kind ``model``.
        dtype: Of weights, cache and activations. (On a CPU a 16-bit model keeps its cache in float32, twice of this.)
        batch_size: Rows answered together.
        text_tokens: Prompt and answer of a row, in tokens, without the image.
        images: Images in the batch; None: one for each row if the model has eyes.

    Raises:
        RecipeError: The recipe is not a valid model.
        DataError: A count is out of range, or a row does not fit the context.
    """
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
    peak = _peak_bytes(model.llm, ((batch_size, row, width), dtype), output_positions=slice(-1, None))
    peak += batch_size * row * width * dtype.itemsize  # the embedded prompt itself
    if count and model.vision is not None:
        size = model.vision.image_size
        peak = max(peak, _peak_bytes(model.vision, ((count, 3, size, size), torch.float32)))
    return MemoryEstimate(
        weights={name: num_bytes(part) for name, part in parts_of(model).items()},
        kv_cache=model.llm.make_cache(batch_size, row, device="meta", dtype=dtype).num_bytes,
        activations=peak,
        num_image_tokens=image_tokens,
    )
