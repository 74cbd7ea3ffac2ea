"""Attention kernels under one signature: xformers, torch's SDPA, and plain matrix products.

A step of the model is described once by an ``AttentionPattern``; the backend makes what it needs of it (a mask, an
xformers bias) in ``prepare``, and every layer calls ``attend`` with that.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.util
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sphinxkit.errors import RegistryError
from sphinxkit.llama.cache import CacheWrite
from sphinxkit.llama.kernels import find_kernels
from sphinxkit.llama.packed import MAX_LENGTH, causal_attention, packed_attention
from sphinxkit.registry import Registry
from sphinxkit.to_device import to_device

HALF_DTYPES = (torch.float16, torch.bfloat16)
# Of a row that is read in blocks. At 256 tokens the calls cost more than they save (0.8 of torch's speed);
# at 512 and 1519 it is 1.4 times as fast; at 4000 the blocks are narrow (0.94). 16 heads of 64 channels, one thread.
BLOCKED_LENGTHS = range(512, 2049)


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPattern:
    """Which keys each query of one step sees.

    - neither ``seq_lens`` nor ``step``: causal over each row.
    - ``seq_lens``: one row of packed samples, causal within each.
    - ``step``: query j of row i sits at position ``starts[i] + j`` and sees the cache's slots up to there.

    Args:
        batch_size: Rows, B.
        width: Queries of a row, S.
        device: Where queries and keys are.
        seq_lens: Lengths of the packed samples; they sum to S.
        step: Places in a cache whose slots are the keys. None for the first step into an empty cache, whose keys are
            the step's own.
    """

    batch_size: int
    width: int
    device: torch.device
    seq_lens: tuple[int, ...] | None = None
    step: CacheWrite | None = None

    def is_token(self) -> bool:
        """Whether this is a step of one token per row over a cache."""
        return self.step is not None and self.width == 1

    def mask(self) -> Tensor:
        """Dense boolean form, True where a query sees a key: (1 or B, 1, S, T), T the keys that a step looks at."""
        columns = torch.arange(self.width, device=self.device)
        if self.step is not None:
            queries = self.step.starts[:, None] + columns
            return (torch.arange(self.step.num_keys, device=self.device) <= queries[:, :, None])[:, None]
        causal = columns <= columns[:, None]
        if self.seq_lens is not None:
            sample = torch.arange(len(self.seq_lens), device=self.device)
            sample = sample.repeat_interleave(to_device(self.seq_lens, self.device), output_size=sum(self.seq_lens))
            causal = causal & (sample == sample[:, None])
        return causal[None, None]


class AttentionBackend(ABC):
    """One way to compute softmax(q k^T / sqrt(D)) v with grouped heads."""

    name: str

    def resolve(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> AttentionBackend:
        """The backend that will run on this device and dtype; raises where a named backend cannot.

        Raises:
            RegistryError: The backend cannot run there; the message says what was tried.
        """
        return self

    def prepare(self, pattern: AttentionPattern, dtype: torch.dtype) -> Any:
        """What ``attend`` needs of a pattern for queries of ``dtype``, built once per step and shared by all layers."""
        return None

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, state: Any) -> Tensor:
        """Attention of one layer.

        Args:
            q: Queries.
            k: Keys; with ``pattern.step`` the cache's, else the step's own.
            v: Values, likewise.
            pattern: Who sees whom.
            state: What ``prepare`` gave for this pattern.
        Shape:
            q: (B, H, S, D)
            k, v: (B, Hkv, T, D); query heads h*H/Hkv ... (h+1)*H/Hkv - 1 share key head h
            return: (B, H, S, D)
        """


class EagerAttention(AttentionBackend):
    """Two matrix products and a softmax in float32: slow and plain, to compare the others with."""

    name = "eager"

    def prepare(self, pattern: AttentionPattern, dtype: torch.dtype) -> Tensor:
        """The dense mask."""
        return pattern.mask()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, state: Any) -> Tensor:
        """See ``AttentionBackend.attend``."""
        compute = torch.promote_types(q.dtype, torch.float32)
        k, v = _repeat_heads(k, q.shape[1]), _repeat_heads(v, q.shape[1])
        scores = (q.to(compute) @ k.to(compute).transpose(-1, -2)) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~state, -torch.inf).softmax(-1)
        out: Tensor = (weights @ v.to(compute)).to(q.dtype)
        return out


class SDPAAttention(AttentionBackend):
    """torch's scaled_dot_product_attention, kept away from its slow corners.

    - Packed samples are looped over: exact, and on a CPU 3 to 5 times faster than a dense mask. Where a CPU trains in
      16 bit, ``packed.packed_attention`` takes the place of torch's kernel, whose backward pass is slow there.
    - Causal rows of 512 to 2048 tokens in bfloat16, on a CPU that multiplies it without matrix tiles (AMX), go through
      ``packed.causal_attention``.
    - In a decoding step a group of query heads becomes the query axis of its key head, so no key is repeated, and in
      16 bit on a CPU a lone query is doubled: with one query torch's kernel takes about twice as long as with two.
    """

    name = "sdpa"

    def prepare(self, pattern: AttentionPattern, dtype: torch.dtype) -> Tensor | None:
        """An additive mask where rows differ or a prefix is cached; None where a causal flag or nothing will do."""
        step = pattern.step
        if step is None or (pattern.width == 1 and step.start is not None and step.num_keys == step.start + 1):
            return None
        mask = pattern.mask()
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, state: Any) -> Tensor:
        """See ``AttentionBackend.attend``."""
        if pattern.is_token():
            return self._decode(q, k, v, state)
        k, v = _repeat_heads(k, q.shape[1]), _repeat_heads(v, q.shape[1])
        if pattern.step is not None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=state)
        if pattern.seq_lens is None:
            if BLOCKED_LENGTHS.start <= q.shape[2] < BLOCKED_LENGTHS.stop and _wants_blocks(q, k, v):
                return causal_attention(q, k, v)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if _wants_packed(q, k, v) and max(pattern.seq_lens) <= MAX_LENGTH:
            return packed_attention(q, k, v, pattern.seq_lens)
        queries, keys, values = (torch.split(x, list(pattern.seq_lens), dim=2) for x in (q, k, v))
        samples = zip(queries, keys, values, strict=True)
        return torch.cat([F.scaled_dot_product_attention(*sample, is_causal=True) for sample in samples], dim=2)

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """One query per row and head: (B, H, 1, D)."""
        folded = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
        group = folded.shape[2]
        if group == 1 and q.dtype in HALF_DTYPES and q.device.type == "cpu":
            folded = folded.expand(-1, -1, 2, -1)
        return F.scaled_dot_product_attention(folded, k, v, attn_mask=mask)[:, :, :group].reshape(q.shape)


@dataclass(frozen=True, slots=True, eq=False)
class _XFormersState:
    bias: Any
    tokens: Tensor | None = None  # real tokens of the flattened (B*S) grid, where padding is left out


class XFormersAttention(AttentionBackend):
    """xformers' memory-efficient attention, for CUDA in float16 and bfloat16.

    Causal and packed steps are differentiable (keys and values are then repeated over their group, which has no
    backward pass of its own). A step over a cache packs the rows: block-diagonal causal with padded keys.

    Args:
        fmha: The module ``xformers.ops.fmha`` or a stand-in for it; None loads xformers at the first use.
    """

    name = "xformers"

    def __init__(self, fmha: Any = None) -> None:
        self._fmha = fmha

    def resolve(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> AttentionBackend:
        """Itself, if a probing call works on this device; the probe runs once per device, dtype and head width."""
        if self._fmha is None:
            fault = xformers_fault(device, dtype, head_dim)
            if fault is not None:
                raise RegistryError(f"attention backend 'xformers' cannot run on {device} in {dtype}: {fault}")
        return self

    def prepare(self, pattern: AttentionPattern, dtype: torch.dtype) -> _XFormersState:
        """The bias object of the step."""
        masks = (self._fmha or _load_xformers().fmha).attn_bias
        step = pattern.step
        if pattern.seq_lens is not None:
            bias = masks.BlockDiagonalMask.from_seqlens(pattern.seq_lens, device=pattern.device)
            return _XFormersState(bias.make_causal())
        if step is None:
            return _XFormersState(masks.LowerTriangularMask())
        padded = masks.BlockDiagonalCausalWithOffsetPaddedKeysMask
        if step.tokens is not None:
            rows = step.tokens // pattern.width
            queries = torch.bincount(rows, minlength=pattern.batch_size).tolist()
            ends = list(step.ends or ())
            bias = padded.from_seqlens(queries, kv_padding=step.num_keys, kv_seqlen=ends, device=pattern.device)
            return _XFormersState(bias, step.tokens)
        # The host does not know the lengths here, and asking would stall the device: a template with full rows gets
        # the lengths as a tensor. Its own copies on the host are upper bounds, which is all that the kernels ask.
        template = _padded_keys_template(padded, pattern.batch_size, pattern.width, step.num_keys, pattern.device)
        filled = (step.starts + pattern.width).to(torch.int32)
        keys = dataclasses.replace(template.k_seqinfo, seqlen=filled)
        return _XFormersState(dataclasses.replace(template, k_seqinfo=keys))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, state: Any) -> Tensor:
        """See ``AttentionBackend.attend``."""
        fmha = self._fmha or _load_xformers().fmha
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, S, H, D): their memory order
        if pattern.step is None:
            if k.shape[2] != q.shape[2]:
                k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
            out: Tensor = fmha.memory_efficient_attention(q, k, v, attn_bias=state.bias)
            return out.transpose(1, 2)
        batch, width, heads, head_dim = q.shape
        groups = k.shape[2]
        packed = q.reshape(1, batch * width, groups, heads // groups, head_dim)
        if state.tokens is not None:
            packed = packed[:, state.tokens]
        # the cache's memory, seen as one sequence: no copy
        k, v = (x.reshape(1, -1, groups, 1, head_dim).expand(-1, -1, -1, heads // groups, -1) for x in (k, v))
        # by name: the choice for grouped heads could fall on a Triton kernel, which needs a compiler at run time
        found = fmha.memory_efficient_attention(packed, k, v, attn_bias=state.bias, op=(fmha.flash.FwOp, None))
        if state.tokens is not None:
            grid = q.new_zeros(batch * width, groups, heads // groups, head_dim)
            grid[state.tokens] = found[0]
            found = grid
        unpacked: Tensor = found.reshape(q.shape)
        return unpacked.transpose(1, 2)


@dataclass(frozen=True, slots=True, eq=False)
class _TokenState:
    kernels: Any
    starts: Tensor


class TokenKernelAttention(AttentionBackend):
    """Another backend, but steps of one token per row go to ``triton_attention.attend_token`` where that works.

    It has its name from the other. The kernel is tried at the first such step: training has none.

    Args:
        backend: For all other steps.
    """

    def __init__(self, backend: AttentionBackend) -> None:
        self.name = backend.name
        self._backend = backend

    def prepare(self, pattern: AttentionPattern, dtype: torch.dtype) -> Any:
        """The kernel for a step of one token; else what the other backend makes of the pattern."""
        if pattern.step is not None and pattern.is_token():
            kernels = find_kernels(pattern.device, "token")
            if kernels is not None:
                return _TokenState(kernels, pattern.step.starts)
        return self._backend.prepare(pattern, dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, state: Any) -> Tensor:
        """See ``AttentionBackend.attend``."""
        if not isinstance(state, _TokenState):
            return self._backend.attend(q, k, v, pattern, state)
        out: Tensor = state.kernels.attend_token(q, k, v, state.starts)
        return out


class AutoAttention(AttentionBackend):
    """xformers on CUDA in float16 and bfloat16 where a probing call works, torch's SDPA elsewhere.

    On CUDA in 16 bit, steps of one token per row go to a Triton kernel that divides each row's keys among programs,
    where that works; xformers' flash operator gives each head to one.
    """

    name = "auto"

    def resolve(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> AttentionBackend:
        """The backend that was chosen."""
        if device.type != "cuda" or dtype not in HALF_DTYPES:
            return SDPAAttention()
        usable = xformers_fault(device, dtype, head_dim) is None
        return TokenKernelAttention(XFormersAttention() if usable else SDPAAttention())

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, state: Any) -> Tensor:
        """Resolve and attend, for one call."""
        backend = self.resolve(q.device, q.dtype, q.shape[-1])
        return backend.attend(q, k, v, pattern, backend.prepare(pattern, q.dtype))


@functools.cache
def _has_slow_tiles() -> bool:
    """Whether the CPU multiplies bfloat16 by itself, but has no tiles, for which torch's kernel is made."""
    features = getattr(torch.cpu, "get_capabilities", dict[str, bool])()  # older torch has none
    return bool(features.get("avx512_bf16")) and not features.get("amx_bf16")


def _wants_blocks(*tensors: Tensor) -> bool:
    """Whether long rows without gradients are read here in blocks; a compiled graph keeps to torch's kernel."""
    if torch.compiler.is_compiling():
        return False
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    q = tensors[0]
    return not trains and q.device.type == "cpu" and q.dtype == torch.bfloat16 and _has_slow_tiles()


def _wants_packed(*tensors: Tensor) -> bool:
    """Whether a CPU in 16 bit will want gradients of these."""
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return trains and tensors[0].device.type == "cpu" and tensors[0].dtype in HALF_DTYPES


def _repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, Hkv, T, D) -> (B, num_heads, T, D), each head repeated consecutively."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], dim=1)


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
    step = CacheWrite(
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
        causal, cached = AttentionPattern(2, 8, device), AttentionPattern(2, 1, device, step=step)
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


registry: Registry[AttentionBackend] = Registry(
    "attention backend",
    {"auto": AutoAttention, "eager": EagerAttention, "sdpa": SDPAAttention, "xformers": XFormersAttention},
)
