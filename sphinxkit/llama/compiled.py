"""Prefill and decoding as separate compiled graphs, one for each bucket of lengths."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sphinxkit.errors import RegistryError, ShapeError
from sphinxkit.llama import backends
from sphinxkit.llama.attention import AttentionContext
from sphinxkit.llama.backends import AttentionBackend, AttentionPattern
from sphinxkit.llama.cache import CacheWrite, KVCache
from sphinxkit.llama.fused import FusedLayers
from sphinxkit.llama.layers import precompute_freqs_cis

if TYPE_CHECKING:
    from sphinxkit.llama.model import LlamaModel

Layers = Callable[[Tensor, AttentionContext], Tensor]
MIN_BUCKET = 64  # shorter prompts cost a CPU or GPU about as much; our choice
BACKENDS = ("auto", "sdpa", "eager")  # attention that can be traced; auto is SDPA here
DEFAULT_COMPILER = "inductor"


def bucket(length: int, limit: int) -> int:
    """The next of 64, 96, 128, 192, 256, 384, 512, ... that holds ``length``: at most a third of it is padding.

    The steps are our choice: powers of two would double the work of a prompt at worst; these make two graphs of each
    power, 13 up to 4096.

    Args:
        length: At least 1.
        limit: The largest bucket; holds ``length``.
    """
    power = max(MIN_BUCKET, 1 << (length - 1).bit_length())
    between = 3 * power // 4
    found = between if power > MIN_BUCKET and between >= length else power
    return min(found, limit)


def compiler_fault(device: torch.device) -> str | None:
    """Why torch's compiler cannot make code for a device; None if nothing is known to be in its way."""
    if device.type == "cpu":
        from torch._inductor import cpp_builder, exc

        try:
            cpp_builder.get_cpp_compiler()
        except (exc.InvalidCxxCompiler, OSError) as error:
            return f"no C++ compiler was found ({error})"
        return None
    from torch.utils import _triton

    return None if _triton.has_triton() else "Triton is missing, or does not know this device"


class CompiledSteps:
    """Compiles reading a prompt and the step of one token per row, once for each bucket of lengths.

    - A prompt into empty rows is padded to a ``bucket`` and read by a graph that knows no cache: padding stands on the
      right, so that under a causal mask no token sees it; only keys and values of the prompt's own columns go to the
      cache, and only the last real position of each row meets ``lm_head``.
    - A prompt behind what a cache holds (the next turn of a chat), and a decoding step, look at all of its slots,
      whose number is a bucket too (``LlamaModel.make_cache``). Padding is written to the last slot, which no row ever
      holds.

    A graph belongs to a number of rows, a width and a number of slots; each is compiled for itself, so none counts
    against the compiler's limit of variants of another. Attention is torch's SDPA (or "eager", by name).

    Args:
        model: On its device, in eval mode; fused, if it is to be.
        compiler: Of ``torch.compile``: "inductor", or another that it knows.
    Raises:
        RegistryError: The compiler cannot run, the attention backend asked for cannot be traced, or weights are packed.
    """

    def __init__(self, model: LlamaModel, compiler: str = DEFAULT_COMPILER) -> None:
        device = model.norm.weight.device
        fault = compiler_fault(device) if compiler == DEFAULT_COMPILER else None
        if fault is not None:
            raise RegistryError(f"compiled steps cannot run on {device}: {fault}")
        if model.attention not in BACKENDS:
            raise RegistryError(
                f"compiled steps can trace attention {', '.join(BACKENDS)}, but the model asks for {model.attention!r}"
            )
        self._model = model
        self._compiler = compiler
        self._attention = backends.registry.build("sdpa" if model.attention == "auto" else model.attention)
        self._graphs: dict[tuple[object, ...], Callable[..., Any]] = {}

    @property
    def num_graphs(self) -> int:
        """Graphs that were asked for so far."""
        return len(self._graphs)

    def clear(self) -> None:
        """Forget all graphs; for when weights were moved or replaced."""
        self._graphs.clear()

    @torch.no_grad()
    def prefill(self, embeds: Tensor, cache: KVCache, lengths: Sequence[int] | Tensor | None = None) -> Tensor:
        """See ``LlamaModel.prefill``; its checks have been made."""
        width = embeds.shape[1]
        step = cache.plan(width, lengths)
        padded = bucket(width, self._model.max_seq_len)
        embeds = F.pad(embeds, (0, 0, 0, padded - width))
        counts = step.counts
        if counts is None:
            counts = torch.full_like(cache.lengths, width)
        if step.start != 0:
            logits = self._behind(embeds, counts, cache)
        else:
            graph, layers = self._graph(_first_pass, len(embeds), padded)
            logits, keys, values = graph(self._model, layers, self._attention, embeds, counts)
            for cached, new in zip((*cache.keys, *cache.values), (*keys, *values), strict=True):
                cached[:, :, :width] = new[:, :width].transpose(1, 2)
        cache.advance(step)
        return logits

    @torch.no_grad()
    def decode(self, token_ids: Tensor, cache: KVCache) -> Tensor:
        """See ``LlamaModel.decode``."""
        if token_ids.shape != (cache.batch_size, 1):
            raise ShapeError(f"expected token ids ({cache.batch_size}, 1), got {tuple(token_ids.shape)}")
        step = cache.plan(1)
        logits = self._behind(self._model.embed(token_ids), torch.ones_like(cache.lengths), cache)
        cache.advance(step)
        return logits

    def _behind(self, embeds: Tensor, counts: Tensor, cache: KVCache) -> Tensor:
        """Read columns behind what the cache holds."""
        rows, width = embeds.shape[:2]
        key = (rows, width, cache.num_slots, cache.dtype, cache.static_shapes)
        graph, layers = self._graph(_cached_pass, *key)
        logits: Tensor = graph(
            self._model, layers, self._attention, embeds, counts, cache.lengths, cache.keys, cache.values
        )
        return logits

    def _graph(self, run: Callable[..., Any], *key: object) -> tuple[Callable[..., Any], Layers]:
        """The compiled function of a key, and the layers that it is to be given."""
        layers = self._model.cached_layers()
        is_fused = isinstance(layers, FusedLayers)
        if isinstance(layers, FusedLayers) and layers.is_packed:
            raise RegistryError("compiled steps cannot trace packed weights; fuse without pack")
        name = (run.__name__, is_fused, *key)
        if name not in self._graphs:
            # the compiler counts variants per code object; a copy has none yet
            code = run.__code__.replace(co_name="_".join(map(str, name)).replace(".", "_"))
            own = types.FunctionType(code, run.__globals__)
            self._graphs[name] = torch.compile(own, fullgraph=True, dynamic=False, backend=self._compiler)
        return self._graphs[name], layers


class _Collected:
    """Takes keys and values of a pass, layer by layer."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    @property
    def dtype(self) -> torch.dtype:
        return self.keys[0].dtype

    def write(self, layer: int, keys: Tensor, values: Tensor, step: CacheWrite) -> None:
        self.keys.append(keys)
        self.values.append(values)

    def read(self, layer: int, step: CacheWrite) -> tuple[Tensor, Tensor]:
        return self.keys[layer].transpose(1, 2), self.values[layer].transpose(1, 2)


class _Slots(_Collected):
    """A cache's memory, with a place (B, S) for every column, padding included."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], places: Tensor) -> None:
        self.keys, self.values = keys, values
        self._rows = torch.arange(len(places), device=places.device)[:, None]
        self._places = places

    def write(self, layer: int, keys: Tensor, values: Tensor, step: CacheWrite) -> None:
        for cached, new in ((self.keys[layer], keys), (self.values[layer], values)):
            cached.transpose(1, 2)[self._rows, self._places] = new.to(cached.dtype)

    def read(self, layer: int, step: CacheWrite) -> tuple[Tensor, Tensor]:
        return self.keys[layer], self.values[layer]


def _first_pass(
    model: LlamaModel, layers: Layers, attention: AttentionBackend, embeds: Tensor, counts: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Rows from position 0: logits (B, 1, V) of the last real one; keys and values (B, S, Hkv, D) of each layer."""
    rows, width = embeds.shape[:2]
    columns = torch.arange(width, device=embeds.device)
    pattern = AttentionPattern(rows, width, embeds.device)
    nowhere = CacheWrite(width, counts, None, None, 0, width, None, None, None)
    found = _Collected()
    step = AttentionContext(
        freqs_cis=precompute_freqs_cis(
            columns[None], model.head_dim, model.rope_theta, model.rope_scaling, as_pairs=True
        ),
        pattern=pattern,
        backend=attention,
        state=attention.prepare(pattern, embeds.dtype),
        cache=found,
        cache_step=nowhere,
    )
    return _logits(model, layers(embeds, step), counts), found.keys, found.values


def _cached_pass(
    model: LlamaModel,
    layers: Layers,
    attention: AttentionBackend,
    embeds: Tensor,
    counts: Tensor,
    starts: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
) -> Tensor:
    """Rows behind ``starts``: logits (B, 1, V) of the last real column."""
    rows, width = embeds.shape[:2]
    num_slots, dtype = keys[0].shape[2], keys[0].dtype
    columns = torch.arange(width, device=embeds.device)
    positions = starts[:, None] + columns
    places = torch.where(columns < counts[:, None], positions, num_slots - 1)
    where = CacheWrite(width, starts, None, counts, None, num_slots, None, None, None)
    pattern = AttentionPattern(rows, width, embeds.device, step=where)
    step = AttentionContext(
        freqs_cis=precompute_freqs_cis(positions, model.head_dim, model.rope_theta, model.rope_scaling, as_pairs=True),
        pattern=pattern,
        backend=attention,
        state=attention.prepare(pattern, dtype),
        cache=_Slots(keys, values, places),
        cache_step=where,
    )
    return _logits(model, layers(embeds, step), counts)


def _logits(model: LlamaModel, hidden: Tensor, counts: Tensor) -> Tensor:
    """Logits (B, 1, V) of each row's last real column."""
    rows = torch.arange(len(hidden), device=hidden.device)
    logits: Tensor = model.lm_head(model.norm(hidden[rows, counts - 1][:, None]))
    return logits
