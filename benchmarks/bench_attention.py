"""Attention kernels at the shapes that SPHINX has: the table that ``attention: auto`` follows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case, Context, Work, nbytes

# Softmax in another order; bf16 has 8 bits of mantissa.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Shape:
    """One attention call.

    Args:
        name: What it is.
        batch: Rows.
        queries: Queries of each row.
        heads: Query heads.
        kv_heads: Key heads.
        head_dim: Channels of a head.
        held: Tokens that each row's cache holds before; None: no cache.
        seq_lens: Packed samples; None: not packed.
    """

    name: str
    batch: int
    queries: int
    heads: int
    kv_heads: int
    head_dim: int
    held: tuple[int, ...] | None = None
    seq_lens: tuple[int, ...] | None = None

    def pairs(self) -> int:
        """Query-key pairs that must be looked at, one head."""
        if self.seq_lens is not None:
            return sum(n * (n + 1) // 2 for n in self.seq_lens)
        own = self.queries * (self.queries + 1) // 2
        return sum(own + self.queries * held for held in self.held or (0,) * self.batch)


def _ragged(rows: int, low: int, high: int) -> tuple[int, ...]:
    return tuple(low + (high - low) * row // max(rows - 1, 1) for row in range(rows))


FULL = {
    "cuda": [
        # in order of worth, as the time may end
        Shape("13B prefill, image and question", 1, 1519, 40, 40, 128),
        Shape("13B training, packed", 1, 4096, 40, 40, 128, seq_lens=(1519, 300, 1519, 700, 58)),
        Shape("13B decode, one row", 1, 1, 40, 40, 128, held=(1600,)),
        Shape("13B decode, 32 ragged rows", 32, 1, 40, 40, 128, held=_ragged(32, 100, 2000)),
        Shape("13B second question after an image", 1, 64, 40, 40, 128, held=(1600,)),
        Shape("Tiny-1k decode, 32 ragged rows, grouped", 32, 1, 32, 4, 64, held=_ragged(32, 100, 2000)),
        Shape("Tiny-1k prefill, grouped", 1, 1359, 32, 4, 64),
        Shape("13B prefill, eight rows", 8, 1519, 40, 40, 128),
    ],
    "cpu": [
        Shape("Tiny-1k prefill, grouped", 1, 1359, 32, 4, 64),
        Shape("packed", 1, 2048, 16, 16, 64, seq_lens=(1519, 300, 171, 58)),
        Shape("decode, one row", 1, 1, 16, 16, 64, held=(1600,)),
        Shape("decode, 8 ragged rows", 8, 1, 16, 16, 64, held=_ragged(8, 100, 2000)),
        Shape("Tiny-1k decode, one row, grouped", 1, 1, 32, 4, 64, held=(1600,)),
    ],
}
QUICK = True
QUICK_SHAPES = [
    Shape("prefill, grouped", 1, 512, 32, 4, 64),
    Shape("packed", 1, 512, 16, 16, 64, seq_lens=(300, 171, 41)),
    Shape("decode, one row", 1, 1, 16, 16, 64, held=(800,)),
    Shape("decode, 8 ragged rows", 8, 1, 16, 16, 64, held=_ragged(8, 50, 800)),
]
MICRO = [
    Shape("prefill, grouped", 2, 8, 4, 2, 8),
    Shape("packed", 1, 9, 4, 4, 8, seq_lens=(4, 3, 2)),
    Shape("decode, ragged", 2, 1, 4, 2, 8, held=(3, 6)),
    Shape("second question", 1, 3, 4, 4, 8, held=(5,)),
]


def cases(context: Context) -> Iterator[Case]:
    on_cuda = context.device.type == "cuda"
    shapes = context.on(FULL["cuda"], FULL["cpu"], MICRO, QUICK_SHAPES)
    for dtype in (torch.bfloat16,) if on_cuda and not context.micro else (torch.bfloat16, torch.float32):
        for shape in shapes:
            yield _case(context, shape, dtype)
            trains = shape is shapes[0] or shape.seq_lens is not None
            if trains and dtype == torch.bfloat16 and (on_cuda or context.micro):
                yield _case(context, shape, dtype, backward=True)


def _case(context: Context, shape: Shape, dtype: torch.dtype, backward: bool = False) -> Case:
    from sphinxkit.llama.backends import AttentionPattern, registry
    from sphinxkit.llama.cache import KVCache

    device, step = context.device, None
    cache = None
    if shape.held is not None:
        capacity = max(shape.held) + shape.queries
        cache = KVCache(1, shape.batch, capacity, shape.kv_heads, shape.head_dim, device=device, dtype=dtype)
        cache.keys[0].normal_()
        cache.values[0].normal_()
        cache.lengths.copy_(torch.tensor(shape.held))
        step = cache.prepare_write(shape.queries)
    pattern = AttentionPattern(shape.batch, shape.queries, device, seq_lens=shape.seq_lens, write=step)

    def random_input() -> tuple[Tensor, Tensor, Tensor]:
        # (B, S, H, D) in memory, as a projection leaves them
        q = context.randn(shape.batch, shape.queries, shape.heads, shape.head_dim, dtype=dtype).transpose(1, 2)
        if cache is not None and step is not None:
            return (q, *cache.read(0, step))
        k, v = (
            context.randn(shape.batch, shape.queries, shape.kv_heads, shape.head_dim, dtype=dtype).transpose(1, 2)
            for _ in range(2)
        )
        return q, k, v

    inputs = [random_input() for _ in range(2)]
    candidates: dict[str, Callable[..., object]] = {}
    skipped = []
    backends = {"sphinxkit": "auto", "sdpa": "sdpa", "eager": "eager"}
    if device.type == "cuda":  # it has no operators for a CPU
        backends["xformers"] = "xformers"
    for label, name in backends.items():
        try:
            backend = registry.build(name).resolve(device, dtype, shape.head_dim)
        except Exception as error:
            skipped.append(f"{name}: {str(error)[:200]}")
            continue
        state = backend.prepare(pattern, dtype)
        candidates[label] = lambda q, k, v, backend=backend, state=state: backend.attend(q, k, v, pattern, state)
    if device.type == "cuda" and pattern.is_token():
        try:
            candidates["xformers split-K"] = _split_k(pattern, dtype)
        except Exception as error:  # what cannot run must not cost the others
            skipped.append(f"xformers split-K: {str(error)[:200]}")
    if device.type == "cuda" or context.micro:
        try:
            candidates |= _torch_alternatives(shape, step, device)
        except Exception as error:  # what torch cannot express must not cost the others
            skipped.append(f"torch's alternatives: {str(error)[:200]}")
    if backward:
        candidates = {name: _with_backward(call) for name, call in candidates.items() if not name.startswith("flex")}
    factor = 2 + 5 * backward  # two products forward; five more backward, the scores' recomputation included
    flops = factor * 2 * shape.heads * shape.head_dim * shape.pairs()
    kept = 2 * shape.kv_heads * shape.head_dim * dtype.itemsize
    keys = sum(shape.held) + shape.batch * shape.queries if shape.held else shape.batch * shape.queries
    written = nbytes(inputs[0][0])
    name = f"{shape.name}{', forward and backward' if backward else ''}, {str(dtype).removeprefix('torch.')}"
    return Case(
        name,
        candidates,
        Work(flops, nbytes(inputs[0][0]) + keys * kept, written * (3 if backward else 1), dtype=dtype),
        inputs,
        amount=shape.batch * shape.queries,
        unit="queries",
        tolerance=TOLERANCE[dtype],
        max_seconds=20,
        note="; ".join(skipped),
    )


def _split_k(pattern: Any, dtype: torch.dtype) -> Callable[..., object]:
    """The backend's own call (it has loaded xformers), with the operator that divides keys in the place of flash."""
    from xformers.ops import fmha

    from sphinxkit.llama.backends import XFormersAttention

    divided = SimpleNamespace(
        memory_efficient_attention=fmha.memory_efficient_attention, flash=fmha.triton_splitk, attn_bias=fmha.attn_bias
    )
    backend = XFormersAttention(divided)
    state = backend.prepare(pattern, dtype)
    return lambda q, k, v: backend.attend(q, k, v, pattern, state)


def _with_backward(call: Callable[..., object]) -> Callable[..., object]:
    def both(*inputs: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            output: Any = call(*leaves)
            return list(torch.autograd.grad(output, leaves, torch.ones_like(output)))

    return both


def _torch_alternatives(shape: Shape, step: Any, device: torch.device) -> dict[str, Callable[..., object]]:
    """FlexAttention and torch's variable-length kernel, where they can express the shape.

    On a CPU (micro sizes only) FlexAttention runs uncompiled, which proves the mask, and the other has no kernel.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if shape.seq_lens is not None:
            return (samples[query] == samples[key]) & (key <= query)
        if step is not None:
            return key <= step.starts[batch] + query
        return key <= query

    keys = shape.queries if step is None else step.num_keys
    if shape.seq_lens is not None:
        lengths = torch.tensor(shape.seq_lens, device=device)
        samples = torch.arange(len(shape.seq_lens), device=device).repeat_interleave(lengths)
    rows = shape.batch if step is not None else None
    mask = create_block_mask(visible, rows, None, shape.queries, keys, str(device))
    is_grouped = shape.heads != shape.kv_heads
    if device.type == "cpu":

        def uncompiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
                return flex_attention(q, k, v, block_mask=mask, enable_gqa=is_grouped)

        return {"flex, not compiled": uncompiled}
    torch.compiler.reset()  # every shape is compiled for itself, as if it were the only one
    compiled = torch.compile(flex_attention, dynamic=False)
    found: dict[str, Callable[..., object]] = {
        "flex, compiled": lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=is_grouped)
    }
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return found
    if step is None and shape.heads == shape.kv_heads:
        lens = shape.seq_lens or (shape.queries,) * shape.batch
        ends = torch.tensor([0, *lens], device=device, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        longest = max(lens)

        def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
            options = _causal(varlen_attn)
            out = varlen_attn(*flat, ends, ends, longest, longest, **options)
            return out.unflatten(0, (shape.batch, shape.queries)).transpose(1, 2)

        found["torch varlen"] = varlen
    return found


def _causal(function: Callable[..., object]) -> dict[str, object]:
    """The causal option of varlen_attn, whose name changed between torch releases."""
    import inspect

    return {"is_causal": True} if "is_causal" in inspect.signature(function).parameters else {"window_size": (-1, 0)}
