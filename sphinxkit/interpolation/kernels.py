"""The arithmetic of every mixing method on flat chunks, so that one implementation serves tensors and streams.

A kernel is prepared once for a tensor, from as many passes over its chunks as its statistics need, and returns a
``Combine`` that mixes one chunk. Chunks are flat, in the accumulation dtype (float32, or float64 for float64 inputs),
and belong to the kernel, which may overwrite them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Combine = Callable[[int, Sequence[Tensor]], Tensor]  # (offset of the chunk in elements, one chunk per model) -> result
Passes = Callable[[], Iterator[tuple[int, list[Tensor]]]]  # starts a new pass over all chunks of one tensor

BLOCK = 2**17  # elements per chunk that kernels see: 0.5 MB in float32, a few of them stay in a core's L2 (our choice)
PARALLEL_SINE = 1e-4  # below this |sin| slerp is linear: at this angle both agree to 1e-8, less than float32 resolves
_GOLDEN = 0x9E3779B97F4A7C15  # odd constant of splitmix64, Steele et al., OOPSLA 2014, doi:10.1145/2660193.2660195


def weighted_sum(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Sum of ``weights[i] * parts[i]``, in place in the first part that counts; parts of weight 0 are left out.

    Every product is rounded before it is added, so two parts give the same bits in either order.

    Args:
        parts: Chunks of one length; overwritten.
        weights: One factor per part.
    Returns:
        The sum; zeros if every weight is 0.
    """
    total: Tensor | None = None
    for part, weight in zip(parts, weights, strict=True):
        if weight == 0:
            continue
        product = part if weight == 1 else part.mul_(weight)
        total = product if total is None else total.add_(product)
    return parts[0].zero_() if total is None else total


def linear_kernel(weights: Sequence[float]) -> Combine:
    """Combine by ``sum_i weights[i] * part_i``."""

    def combine(_: int, parts: Sequence[Tensor]) -> Tensor:
        return weighted_sum(parts, weights)

    return combine


def task_vectors(parts: Sequence[Tensor]) -> list[Tensor]:
    """``part_i - base`` for every part after the first, which is the base; in place."""
    return [part.sub_(parts[0]) for part in parts[1:]]


def task_kernel(weights: Sequence[float]) -> Combine:
    """Combine by ``base + sum_i weights[i] * (part_i - base)``; the first part is the base."""

    def combine(_: int, parts: Sequence[Tensor]) -> Tensor:
        return parts[0].add_(weighted_sum(task_vectors(parts), weights))

    return combine


def slerp_coefficients(dot: float, norm_a: float, norm_b: float, t: float) -> tuple[float, float]:
    """Factors of the two vectors on the arc between their directions.

    Linear factors where the arc is not defined: a zero vector, parallel or anti-parallel vectors.

    Args:
        dot: Scalar product of the two vectors.
        norm_a: Length of the first.
        norm_b: Length of the second.
        t: Position on the arc, 0 at the first.
    Source: Shoemake, SIGGRAPH 1985, doi:10.1145/325334.325242.
    """
    if norm_a == 0 or norm_b == 0 or not math.isfinite(dot):
        return 1 - t, t
    angle = math.acos(max(-1.0, min(1.0, dot / (norm_a * norm_b))))
    sine = math.sin(angle)
    if abs(sine) < PARALLEL_SINE:
        return 1 - t, t
    return math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine


def slerp_kernel(passes: Passes, t: float) -> Combine:
    """Combine two parts on the arc between them; one pass finds the angle, in float64."""
    dot = square_a = square_b = 0.0
    for _, (a, b) in passes():
        a64, b64 = a.double(), b.double()
        dot += torch.dot(a64, b64).item()
        square_a += torch.dot(a64, a64).item()
        square_b += torch.dot(b64, b64).item()
    return linear_kernel(slerp_coefficients(dot, math.sqrt(square_a), math.sqrt(square_b), t))


def _histogram(passes: Passes, parts: int, shift: int, prefix: Sequence[int] | None) -> list[Tensor]:
    """Counts of 16 bits of each task vector's float32 magnitude; with a prefix, of the values whose upper 16 match."""
    counts = [torch.zeros(2**16, dtype=torch.int64) for _ in range(parts)]
    for _, chunk in passes():
        for index, vector in enumerate(task_vectors(chunk)):
            bits = vector.float().abs().view(torch.int32)
            if prefix is not None:
                bits = bits[(bits >> 16) == prefix[index]]
            counts[index] += torch.bincount((bits >> shift) & 0xFFFF, minlength=2**16)
    return counts


def _bin_from_top(counts: Tensor, keep: int) -> tuple[int, int]:
    """The bin that holds the ``keep``-th largest value, and how many of that bin are wanted."""
    from_top = counts.flip(0).cumsum(0)
    index = int(torch.searchsorted(from_top, keep))
    above = int(from_top[index - 1]) if index else 0
    return len(counts) - 1 - index, keep - above


def magnitude_thresholds(passes: Passes, num_vectors: int, density: float) -> list[float]:
    """Smallest float32 magnitude that each task vector keeps when a fraction ``density`` of it is kept.

    Exact, in two passes and constant memory: the bits of a non-negative float32 sort as its value does, so a
    histogram of the upper 16 bits finds the bin and one of the lower 16 bits finds the value.

    Args:
        passes: Starts a pass over the chunks, base first.
        num_vectors: How many task vectors there are.
        density: Fraction kept; the number is rounded to the nearest and is at least one.
    """
    if density >= 1:
        return [0.0] * num_vectors
    upper = _histogram(passes, num_vectors, 16, None)
    keep = max(1, int(density * int(upper[0].sum()) + 0.5))
    high = [_bin_from_top(counts, keep) for counts in upper]
    lower = _histogram(passes, num_vectors, 0, [index for index, _ in high])
    bits = [(index << 16) | _bin_from_top(counts, rest)[0] for (index, rest), counts in zip(high, lower, strict=True)]
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32).tolist()


def ties_kernel(passes: Passes, weights: Sequence[float], density: float, scale: float) -> Combine:
    """Trim, elect signs, and merge the task vectors that agree; the first part is the base.

    Source: TIES-Merging, arXiv:2306.01708, Algorithm 1. Weights (all 1 there) scale a vector's vote and its share of
    the mean, so equal weights give the paper's disjoint mean.
    """
    thresholds = magnitude_thresholds(passes, len(weights), density)

    def combine(_: int, parts: Sequence[Tensor]) -> Tensor:
        votes = []
        for vector, weight, threshold in zip(task_vectors(parts), weights, thresholds, strict=True):
            votes.append(vector.masked_fill_(vector.float().abs() < threshold, 0.0).mul_(weight))
        elected = torch.stack(votes).sum(0).sign_()
        total = torch.zeros_like(elected)
        share = torch.zeros_like(elected)
        for vote, weight in zip(votes, weights, strict=True):
            agrees = (vote.sign() == elected) & (vote != 0)
            total += vote * agrees
            share.add_(agrees, alpha=abs(weight))
        merged = torch.where(share > 0, total / share.clamp_min(torch.finfo(share.dtype).tiny), 0.0)
        return parts[0].add_(merged, alpha=scale)

    return combine


def block_seed(seed: int, model: int, block: int) -> int:
    """A 63-bit seed of its own for each (seed, model, block), by splitmix64's finaliser."""
    state = (seed * _GOLDEN + model * 0xD1B54A32D192ED03 + block * 0x8CB92BA72F3D8DD7) & 0xFFFFFFFFFFFFFFFF
    for multiplier, shift in ((0xBF58476D1CE4E5B9, 30), (0x94D049BB133111EB, 27)):
        state = ((state ^ (state >> shift)) * multiplier) & 0xFFFFFFFFFFFFFFFF
    return (state ^ (state >> 31)) >> 1


def dare_kernel(weights: Sequence[float], drop_rate: float, seed: int) -> Combine:
    """Drop each task vector's elements at random and rescale the rest by ``1 / (1 - drop_rate)``; first part: base.

    Which elements go depends on the seed, the model's place and the element's position only, never on how the tensor
    is cut into chunks; chunks start at a multiple of ``BLOCK``.

    Source: DARE, arXiv:2311.03099, section 3.2.
    """
    rescale = 1 / (1 - drop_rate)

    def combine(offset: int, parts: Sequence[Tensor]) -> Tensor:
        base = parts[0]
        for model, (vector, weight) in enumerate(zip(task_vectors(parts), weights, strict=True)):
            if weight == 0:
                continue
            for start in range(0, vector.numel(), BLOCK):
                piece = vector[start : start + BLOCK]
                generator = torch.Generator().manual_seed(block_seed(seed, model, (offset + start) // BLOCK))
                dropped = torch.rand(BLOCK, generator=generator)[: piece.numel()] < drop_rate
                piece.masked_fill_(dropped, 0.0)
            base.add_(vector, alpha=weight * rescale)
        return base

    return combine
