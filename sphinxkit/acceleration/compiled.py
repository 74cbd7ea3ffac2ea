"""Text generation by ``torch.compile``: prefill and decoding as graphs, one for each bucket of lengths."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sphinxkit.acceleration.accelerator import FusedAccelerator, obstacle
from sphinxkit.acceleration.fused import FusedLayers
from sphinxkit.acceleration.snapshot import Snapshot
from sphinxkit.errors import RegistryError
from sphinxkit.llama.attention import AttentionContext
from sphinxkit.llama.backends import AttentionBackend, AttentionPattern, SDPAAttention
from sphinxkit.llama.cache import CacheWrite, KVCache
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
    """Reason why torch's compiler cannot compile for a device; None if none is known."""
    if device.type == "cpu":
        from torch._inductor import cpp_builder, exc

        try:
            cpp_builder.get_cpp_compiler()
        except (exc.InvalidCxxCompiler, OSError) as error:
            return f"no C++ compiler was found ({error})"
        return None
    from torch.utils import _triton

    return None if _triton.has_triton() else "Triton is missing, or does not know this device"


class CompiledAccelerator(FusedAccelerator):
    """``FusedAccelerator`` whose prefill and decoding are compiled, once for each bucket of lengths.

    - A prompt into empty rows is padded to a ``bucket`` and read by a graph that knows no cache: padding stands on the
      right, so that under a causal mask no token sees it. Only keys and values of the prompt's own columns go to the
      cache, and only the last real position of each row meets ``lm_head``.
    - A prompt behind what a cache holds (the next turn of a chat), and a decoding step, look at all of its slots,
      whose number is a bucket too (``cache_capacity``). Padding is written to the last slot, which no row ever holds.
    - On CUDA the decoding step is compiled in mode "reduce-overhead", in which torch records and replays CUDA graphs.

    A graph belongs to a number of rows, a width and a number of slots; each is compiled for itself, so none counts
    against the compiler's limit of variants of another. It is compiled when it is first needed, which takes seconds to
    minutes. Attention is torch's SDPA (or "eager", by name). Drafts are read by the fused layers. Weights that cannot
    be joined in a model that is otherwise plain (torchao's) are compiled through the modules.

    Args:
        compiler: Of ``torch.compile``: "inductor", or another that it knows.
        use_gemv: See ``FusedLayers``; for what is not compiled.
    """

    def __init__(self, compiler: str = DEFAULT_COMPILER, *, use_gemv: bool = True) -> None:
        super().__init__(use_gemv=use_gemv)
        self._compiler = compiler
        self._graphs: dict[tuple[object, ...], Callable[..., Any]] = {}
        self._traced: FusedLayers | None = None  # what the graphs were made of
        self._modules: Snapshot | None = None  # of a plain model whose weights cannot be joined

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles."""
        return partial(type(self), self._compiler, use_gemv=self._use_gemv), ()

    def check(self, model: LlamaModel) -> None:
        """Raise where a model cannot be compiled.

        Args:
            model: On its device.
        Raises:
            RegistryError: The compiler cannot run, or the attention backend asked for cannot be traced.
        """
        device = model.norm.weight.device
        fault = compiler_fault(device) if self._compiler == DEFAULT_COMPILER else None
        if fault is not None:
            raise RegistryError(f"compiled steps cannot run on {device}: {fault}")
        if model.attention not in BACKENDS:
            raise RegistryError(
                f"compiled steps can trace attention {', '.join(BACKENDS)}, but the model asks for {model.attention!r}"
            )

    @property
    def num_graphs(self) -> int:
        """Graphs that were asked for so far."""
        return len(self._graphs)

    def reset(self) -> None:
        """Forget the joint weights and all graphs."""
        super().reset()
        self._graphs.clear()
        self._traced = self._modules = None

    def cache_capacity(self, capacity: int, limit: int) -> int:
        """Capacity of a bucket, so that compiled graphs are reused."""
        return bucket(capacity, limit)

    @torch.no_grad()
    def prefill(
        self,
        model: LlamaModel,
        embeds: Tensor,
        cache: KVCache,
        lengths: Sequence[int] | Tensor | None,
        all_positions: bool,
    ) -> Tensor:
        """See ``LlamaModel.prefill``. Shape: as there."""
        layers = None if all_positions else self._traceable(model, self.prepare(model))
        if layers is None:
            return super().prefill(model, embeds, cache, lengths, all_positions)
        width = embeds.shape[1]
        write = cache.prepare_write(width, lengths)
        padded = bucket(width, model.max_seq_len)
        embeds = F.pad(embeds, (0, 0, 0, padded - width))
        counts = write.counts
        if counts is None:
            counts = torch.full_like(cache.lengths, width)
        if write.start != 0:
            logits = self._behind(model, layers, embeds, counts, cache)
        else:
            graph = self._graph(_first_pass, layers, len(embeds), padded)
            logits, keys, values = graph(model, layers, _attention(model), embeds, counts)
            for cached, new in zip((*cache.keys, *cache.values), (*keys, *values), strict=True):
                cached[:, :, :width] = new[:, :width].transpose(1, 2)
        cache.advance(write)
        return logits

    @torch.no_grad()
    def decode(self, model: LlamaModel, token_ids: Tensor, cache: KVCache) -> Tensor:
        """See ``LlamaModel.decode``. Shape: as there."""
        layers = self._traceable(model, self.current(model))
        if layers is None:
            return super().decode(model, token_ids, cache)
        write = cache.prepare_write(1)
        logits = self._behind(model, layers, model.embed(token_ids), torch.ones_like(cache.lengths), cache)
        cache.advance(write)
        return logits

    def _traceable(self, model: LlamaModel, fused: FusedLayers | None) -> Layers | None:
        """The layers that are compiled; None if the model has to run as it is."""
        if fused is not self._traced:  # joined again
            self._graphs.clear()
            self._traced = fused
        if fused is not None:
            return fused
        if self._modules is None or not self._modules.is_same():
            self._modules = None if obstacle(model) is not None else Snapshot(model)
        is_plain = self._modules is not None and not model.training and not self._modules.is_watched()
        return model.run_layers if is_plain else None

    def _behind(self, model: LlamaModel, layers: Layers, embeds: Tensor, counts: Tensor, cache: KVCache) -> Tensor:
        """Read columns behind what the cache holds."""
        rows, width = embeds.shape[:2]
        graph = self._graph(_cached_pass, layers, rows, width, cache.num_slots, cache.dtype, cache.static_shapes)
        places = (embeds, counts, cache.lengths, cache.keys, cache.values)
        is_replayed = embeds.is_cuda and width == 1
        if is_replayed:  # not copied into the recorded graph's own memory, which is what the others are
            _keep_in_place([*cache.keys, *cache.values, *_weights_of(layers)])
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        logits: Tensor = graph(model, layers, _attention(model), *places)
        return logits.clone() if is_replayed else logits  # the next replay writes where this one did

    def _graph(self, run: Callable[..., Any], layers: Layers, *key: object) -> Callable[..., Any]:
        """The compiled function of a key."""
        name = (run.__name__, isinstance(layers, FusedLayers), *key)
        if name not in self._graphs:
            # the compiler counts variants per code object; a copy has none yet
            code = run.__code__.replace(co_name="_".join(map(str, name)).replace(".", "_"))
            own = types.FunctionType(code, run.__globals__)
            options: dict[str, Any] = {"backend": self._compiler}
            is_decoding = run is _cached_pass and key[1] == 1
            if is_decoding and self._compiler == DEFAULT_COMPILER and torch.cuda.is_available():
                options["mode"] = "reduce-overhead"  # without effect on a CPU
            self._graphs[name] = torch.compile(own, fullgraph=True, dynamic=False, **options)
        return self._graphs[name]


def _attention(model: LlamaModel) -> AttentionBackend:
    """What is traced for a model's attention."""
    return SDPAAttention() if model.attention == "auto" else model.attention_backend


def _weights_of(layers: Layers) -> list[Tensor]:
    """Joint weights; the compiler knows itself that parameters stay where they are."""
    return layers.tensors() if isinstance(layers, FusedLayers) else []


def _keep_in_place(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        if not hasattr(tensor, "_dynamo_static_input_type"):
            torch._dynamo.mark_static_address(tensor, guard=False)


class _Collected:
    """Takes keys and values of a pass, layer by layer."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    @property
    def dtype(self) -> torch.dtype:
        return self.keys[0].dtype

    def write(self, layer: int, keys: Tensor, values: Tensor, where: CacheWrite) -> None:
        """Shape: keys, values: (B, S, Hkv, D)."""
        self.keys.append(keys)
        self.values.append(values)

    def read(self, layer: int, where: CacheWrite) -> tuple[Tensor, Tensor]:
        return self.keys[layer].transpose(1, 2), self.values[layer].transpose(1, 2)


class _Slots(_Collected):
    """A cache's memory, with a place (B, S) for every column, padding included."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], places: Tensor) -> None:
        self.keys, self.values = keys, values
        self._rows = torch.arange(len(places), device=places.device)[:, None]
        self._places = places

    def write(self, layer: int, keys: Tensor, values: Tensor, where: CacheWrite) -> None:
        """Shape: keys, values: (B, S, Hkv, D)."""
        for cached, new in ((self.keys[layer], keys), (self.values[layer], values)):
            cached.transpose(1, 2)[self._rows, self._places] = new.to(cached.dtype)

    def read(self, layer: int, where: CacheWrite) -> tuple[Tensor, Tensor]:
        return self.keys[layer], self.values[layer]


def _first_pass(
    model: LlamaModel, layers: Layers, attention: AttentionBackend, embeds: Tensor, counts: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Rows from position 0: logits (B, 1, V) of the last real one; keys and values (B, S, Hkv, D) of each layer."""
    rows, width = embeds.shape[:2]
    columns = torch.arange(width, device=embeds.device)
    pattern = AttentionPattern(rows, width, embeds.device, window=model.window(width))
    nowhere = CacheWrite(width, counts, None, None, 0, width, None, None, None)
    found = _Collected()
    context = AttentionContext(
        freqs_cis=model.freqs_cis(columns[None], counts[:, None], as_pairs=True),
        pattern=pattern,
        backend=attention,
        state=attention.prepare(pattern, embeds.dtype),
        cache=found,
        cache_write=nowhere,
    )
    return _logits(model, layers(embeds, context), counts), found.keys, found.values


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
    pattern = AttentionPattern(rows, width, embeds.device, write=where, window=model.window(num_slots))
    context = AttentionContext(
        freqs_cis=model.freqs_cis(positions, (starts + counts)[:, None], as_pairs=True),
        pattern=pattern,
        backend=attention,
        state=attention.prepare(pattern, dtype),
        cache=_Slots(keys, values, places),
        cache_write=where,
    )
    return _logits(model, layers(embeds, context), counts)


def _logits(model: LlamaModel, hidden: Tensor, counts: Tensor) -> Tensor:
    """Logits (B, 1, V) of each row's last real column."""
    rows = torch.arange(len(hidden), device=hidden.device)
    logits: Tensor = model.lm_head(model.norm(hidden[rows, counts - 1][:, None]))
    return logits
