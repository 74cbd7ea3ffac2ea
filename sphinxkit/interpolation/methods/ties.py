"""TIES: trim the task vectors, elect a sign for each element, merge those that agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sphinxkit.interpolation.method import Combine, Passes, check_fraction, check_number, register
from sphinxkit.interpolation.methods.task_arithmetic import TaskArithmetic, task_vectors


@register("ties")
@dataclass(frozen=True)
class Ties(TaskArithmetic):
    """Trim, elect sign, merge, with the cut made tensor by tensor.

    Args:
        density: Fraction of each task vector that is kept, in (0, 1]; the paper keeps 20 %.
        scale: The paper's lambda.
    Raises:
        DataError: ``density`` is outside (0, 1], or ``scale`` is not finite.
    Source: TIES-Merging, arXiv:2306.01708, section 4, Algorithm 1.
    """

    density: float = 0.2
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_fraction("density", self.density, low_open=True)
        check_number("scale", self.scale)

    def copy_of(self, weights: Sequence[float]) -> int | None:
        """The result equals a model only if nothing is trimmed or scaled."""
        if self.scale == 0:
            return -1
        copied = super().copy_of(weights)
        return copied if copied == -1 or (self.density == 1 and self.scale == 1) else None

    def prepare(self, passes: Passes, weights: Sequence[float], name: str | None = None) -> Combine:
        """Trim, elect signs, and merge the task vectors that agree; the first part is the base.

        Weights (all 1 in the paper) scale a vector's vote and its share of the mean, so equal weights give the paper's
        disjoint mean.
        """
        thresholds = magnitude_thresholds(passes, len(weights), self.density)

        def combine(_: int, parts: Sequence[Tensor]) -> Tensor:
            """Shape: parts, return: all (N,)."""
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
            return parts[0].add_(merged, alpha=self.scale)

        return combine


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


def ties(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    density: float = 0.2,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Trim, elect sign and merge.

    Each task vector keeps its largest magnitudes, each element elects the sign with the greater total, and the mean of
    the values with that sign is added to the base.

    Args:
        base: The common ancestor.
        tensors: Models fine-tuned from the base.
        weights: Weight of each tensor in votes and mean; default: all 1, as in the paper.
        density: See :class:`Ties`. The cut is per tensor given: pass a flattened model for the paper's whole-model
            cut. Equal magnitudes at the cut are all kept.
        scale: See :class:`Ties`.
        dtype: Dtype of the result.
    Shape:
        base, tensors, return: all the same, any
    Raises:
        ShapeError: Different shapes.
        DataError: Not one finite weight per tensor, ``density`` outside (0, 1], or ``scale`` is not finite.
    Source: TIES-Merging, arXiv:2306.01708, section 4, Algorithm 1.
    """
    method = Ties(density, scale)
    return method.apply(
        tensors, method.default_weights(len(tensors)) if weights is None else weights, base=base, dtype=dtype
    )
