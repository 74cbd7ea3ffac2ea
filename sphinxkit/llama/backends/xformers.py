"""Attention by xformers, for CUDA in 16 bit; ``auto`` takes it where a probing call works."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sphinxkit.errors import RegistryError
from sphinxkit.llama.backends.base import HALF_DTYPES, AttentionBackend, AttentionPattern, registry
from sphinxkit.llama.backends.eager import EagerAttention
from sphinxkit.llama.backends.sdpa import SDPAAttention
from sphinxkit.llama.cache import CacheWrite


@dataclass(frozen=True, slots=True, eq=False)
class _XFormersState:
    bias: Any
    tokens: Tensor | None = None  # real tokens of the flattened (B*S) grid, where padding is left out


@registry.register("xformers")
class XFormersAttention(AttentionBackend):
    """xformers' memory-efficient attention, for CUDA in float16 and bfloat16.

    Causal rows and packed samples are differentiable (keys and values are then repeated over their group, which has no
    backward pass of its own). Over a cache all rows become one sequence: block-diagonal causal with padded keys.

    Args:
        fmha: The module ``xformers.ops.fmha`` or a stand-in for it; None loads xformers at the first use.
    """

    name = "xformers"

    def __init__(self, fmha: Any = None) -> None:
        self._fmha = fmha

    def resolve(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, window: int | None = None
    ) -> AttentionBackend:
        """Itself, if a probing call works on this device; the probe runs once per device, dtype and head width."""
        if window is not None:
            raise RegistryError(f"attention backend 'xformers' has no sliding window (of {window}); take sdpa or auto")
        if self._fmha is None:
            fault = xformers_fault(device, dtype, head_dim)
            if fault is not None:
                raise RegistryError(f"attention backend 'xformers' cannot run on {device} in {dtype}: {fault}")
        return self

    def prepare(self, pattern: AttentionPattern, dtype: torch.dtype) -> _XFormersState:
        """The bias object of the write."""
        masks = (self._fmha or _load_xformers().fmha).attn_bias
        write = pattern.write
        if pattern.seq_lens is not None:
            bias = masks.BlockDiagonalMask.from_seqlens(pattern.seq_lens, device=pattern.device)
            return _XFormersState(bias.make_causal())
        if write is None:
            return _XFormersState(masks.LowerTriangularMask())
        padded = masks.BlockDiagonalCausalWithOffsetPaddedKeysMask
        if write.tokens is not None:
            rows = write.tokens // pattern.width
            queries = torch.bincount(rows, minlength=pattern.batch_size).tolist()
            ends = list(write.ends or ())
            bias = padded.from_seqlens(queries, kv_padding=write.num_keys, kv_seqlen=ends, device=pattern.device)
            return _XFormersState(bias, write.tokens)
        # The host does not know the lengths here, and asking would stall the device: a template with full rows gets
        # the lengths as a tensor. Its own copies on the host are upper bounds, which is all that the kernels ask.
        template = _padded_keys_template(padded, pattern.batch_size, pattern.width, write.num_keys, pattern.device)
        filled = (write.starts + pattern.width).to(torch.int32)
        keys = dataclasses.replace(template.k_seqinfo, seqlen=filled)
        return _XFormersState(dataclasses.replace(template, k_seqinfo=keys))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, state: Any) -> Tensor:
        """See ``AttentionBackend.attend``. Shape: as there."""
        fmha = self._fmha or _load_xformers().fmha
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, S, H, D): their memory order
        if pattern.write is None:
            if k.shape[2] != q.shape[2]:
                k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
            out: Tensor = fmha.memory_efficient_attention(q, k, v, attn_bias=state.bias)
            return out.transpose(1, 2)
        batch, width, heads, head_dim = q.shape
        groups = k.shape[2]
        flat = q.reshape(1, batch * width, groups, heads // groups, head_dim)
        if state.tokens is not None:
            flat = flat[:, state.tokens]
        # the cache's memory, seen as one sequence: no copy
        k, v = (x.reshape(1, -1, groups, 1, head_dim).expand(-1, -1, -1, heads // groups, -1) for x in (k, v))
        # by name: the choice for grouped heads could fall on a Triton kernel, which needs a compiler at run time
        found = fmha.memory_efficient_attention(flat, k, v, attn_bias=state.bias, op=(fmha.flash.FwOp, None))
        if state.tokens is not None:
            grid = q.new_zeros(batch * width, groups, heads // groups, head_dim)
            grid[state.tokens] = found[0]
            found = grid
        out = found.reshape(q.shape)
        return out.transpose(1, 2)


@registry.register("auto")
class AutoAttention(AttentionBackend):
    """xformers on CUDA in float16 and bfloat16 where a probing call works, torch's SDPA elsewhere and in a window."""

    name = "auto"

    def resolve(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, window: int | None = None
    ) -> AttentionBackend:
        """The backend that was chosen."""
        suits = device.type == "cuda" and dtype in HALF_DTYPES and window is None
        if suits and xformers_fault(device, dtype, head_dim) is None:
            return XFormersAttention()
        return SDPAAttention()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, state: Any) -> Tensor:
        """Resolve and attend, for one call. Shape: as ``AttentionBackend.attend``."""
        backend = self.resolve(q.device, q.dtype, q.shape[-1], pattern.window)
        return backend.attend(q, k, v, pattern, backend.prepare(pattern, q.dtype))


@functools.lru_cache(maxsize=16)
def _padded_keys_template(mask: Any, batch_size: int, width: int, num_keys: int, device: torch.device) -> Any:
    return mask.from_seqlens(
        [width] * batch_size, kv_padding=num_keys, kv_seqlen=[num_keys] * batch_size, device=device
    )


@dataclass(frozen=True, slots=True)
class _XFormers:
    fmha: Any
    tried: tuple[str, ...]


def _cuda_runtime_12() -> Path | None:
    """``libcudart.so.12`` of the package nvidia-cuda-runtime-cu12, if that is installed."""
    try:
        spec = importlib.util.find_spec("nvidia.cuda_runtime")
    except ModuleNotFoundError:
        return None
    folders: Sequence[str] = () if spec is None else (spec.submodule_search_locations or ())
    libraries = (Path(folder) / "lib" / "libcudart.so.12" for folder in folders)
    return next((library for library in libraries if library.is_file()), None)


@functools.cache
def _load_xformers() -> _XFormers:
    """Import xformers, past the missing CUDA runtime of its wheel.

    xformers 0.0.35's wheel links CUDA 12. Beside a torch built for CUDA 13 its extension does not load, and then every
    operator refuses CUDA tensors, although the ones used here call torch's own kernels and never enter the extension.
    First the CUDA 12 runtime is loaded if its package is installed; if the extension still does not load, the flag
    that the operators look at is set.
    """
    tried: list[str] = []
    if torch.version.cuda is not None and not torch.version.cuda.startswith("12."):
        library = _cuda_runtime_12()
        if library is None:
            tried.append("no nvidia-cuda-runtime-cu12 installed to load libcudart.so.12 from")
        else:
            try:
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
                tried.append(f"loaded {library.name} before xformers")
            except OSError as error:
                tried.append(f"loading {library} failed: {error}")
    logger = logging.getLogger("xformers")
    level = logger.level
    logger.setLevel(logging.ERROR)  # importing it warns that there will be no attention, which is not so (see above)
    try:
        import xformers.ops.fmha as fmha
    finally:
        logger.setLevel(level)
    tried.append("imported xformers.ops.fmha")
    if not fmha.common._built_with_cuda:
        fmha.common._built_with_cuda = True
        tried.append("its extension did not load, so its CUDA flag was set by hand")
    return _XFormers(fmha, tuple(tried))


def xformers_fault(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why xformers cannot be used, or None if a real call gave the right answer.

    The answer is kept for each device, dtype and head width.

    Args:
        device: Where the model runs.
        dtype: Of queries and keys.
        head_dim: Channels of a head.
    """
    if device.type != "cuda":
        return "it has operators for CUDA only"
    if dtype not in HALF_DTYPES:
        return "it takes float16 and bfloat16 here (the operators for cached keys have no float32)"
    if head_dim % 8 or head_dim > 256:
        return f"its flash operator takes head widths that are multiples of 8 up to 256, got {head_dim}"
    index = device.index if device.index is not None else torch.cuda.current_device()
    return _probe_xformers(torch.device("cuda", index), dtype, head_dim)


@functools.cache
def _probe_xformers(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Compare a small causal call, and one over padded keys, with matrix products."""
    try:
        loaded = _load_xformers()
    except (ImportError, OSError) as error:
        return f"importing xformers failed: {error}"
    tried = ", ".join(loaded.tried)
    generator = torch.Generator(device).manual_seed(0)
    write = CacheWrite(
        width=1,
        starts=torch.tensor([3, 7], device=device),
        ends=None,
        counts=None,
        start=None,
        num_keys=8,
        tokens=None,
        rows=None,
        slots=None,
    )
    backend, oracle = XFormersAttention(loaded.fmha), EagerAttention()
    with torch.no_grad(), torch.inference_mode(False):
        q = torch.randn(2, 8, 2, head_dim, device=device, generator=generator).to(dtype).transpose(1, 2)
        k, v = torch.randn(2, 2, 8, 2, head_dim, device=device, generator=generator).to(dtype).transpose(2, 3)
        causal, cached = AttentionPattern(2, 8, device), AttentionPattern(2, 1, device, write=write)
        for pattern, queries in ((causal, q), (cached, q[:, :, :1])):
            try:
                got = backend.attend(queries, k, v, pattern, backend.prepare(pattern, dtype))
                expected = oracle.attend(queries, k, v, pattern, oracle.prepare(pattern, dtype))
                difference = float((got.float() - expected.float()).abs().max())
            except Exception as error:  # somebody else's code: whatever it raises means that it cannot be used
                return f"a probing call failed ({tried}): {str(error).strip()}"
            # values are of order 1 and 16-bit rounding is 2^-8 of that: 0.05 leaves a factor of 10
            if not difference < 0.05:
                return f"a probing call gave wrong numbers, off by {difference} ({tried})"
    return None
