"""DARE: drop elements of the task vectors at random and rescale the rest."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sphinxkit.interpolation.method import BLOCK, Combine, Passes, check_fraction, check_number, register
from sphinxkit.interpolation.methods.task_arithmetic import TaskArithmetic, task_vectors


@register("dare")
@dataclass(frozen=True)
class Dare(TaskArithmetic):
    """Drop and rescale task vectors.

    Args:
        drop_rate: Probability that an element is dropped, in [0, 1); the paper finds 0.9 harmless.
        seed: A tensor with a name draws with ``tensor_seed(seed, name)``, one without with the seed itself.
    Raises:
        DataError: ``drop_rate`` is outside [0, 1), or ``seed`` is not a whole number.
    Source: DARE, arXiv:2311.03099, section 3.2 (drop and rescale) with 3.3 (merging).
    """

    drop_rate: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        check_fraction("drop_rate", self.drop_rate, high_open=True)
        check_number("seed", self.seed, whole=True)

    def copy_of(self, weights: Sequence[float]) -> int | None:
        """The result equals a model only if nothing is dropped."""
        copied = super().copy_of(weights)
        return copied if copied == -1 or self.drop_rate == 0 else None

    def prepare(self, passes: Passes, weights: Sequence[float], name: str | None = None) -> Combine:
        """Drop each task vector's elements at random and rescale the rest by ``1 / (1 - drop_rate)``; base first.

        Which elements are dropped depends on the seed, the model's place and the element's position only, never on how
        the tensor is cut into chunks; chunks start at a multiple of ``BLOCK``.
        """
        seed = self.seed if name is None else tensor_seed(self.seed, name)
        rescale = 1 / (1 - self.drop_rate)

        def combine(offset: int, parts: Sequence[Tensor]) -> Tensor:
            """Shape: parts, return: all (N,)."""
            base = parts[0]
            for model, (vector, weight) in enumerate(zip(task_vectors(parts), weights, strict=True)):
                if weight == 0:
                    continue
                for start in range(0, vector.numel(), BLOCK):
                    piece = vector[start : start + BLOCK]
                    generator = torch.Generator().manual_seed(block_seed(seed, model, (offset + start) // BLOCK))
                    dropped = torch.rand(BLOCK, generator=generator)[: piece.numel()] < self.drop_rate
                    piece.masked_fill_(dropped, 0.0)
                base.add_(vector, alpha=weight * rescale)
            return base

        return combine


def tensor_seed(seed: int, name: str) -> int:
    """The seed with which elements of the tensor called ``name`` are dropped."""
    return seed * 2**32 + zlib.crc32(name.encode())


def block_seed(seed: int, model: int, block: int) -> int:
    """A 63-bit seed of its own for each (seed, model, block), by a hash."""
    digest = hashlib.blake2b(f"{seed} {model} {block}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def dare(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    drop_rate: float = 0.9,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Drop task vectors' elements at random, rescale the rest, then add them to the base with weights.

    Args:
        base: The common ancestor.
        tensors: Models fine-tuned from the base.
        weights: One per tensor.
        drop_rate: See :class:`Dare`.
        seed: Same seed, same result, however the tensor is cut into chunks.
        dtype: Dtype of the result.
    Shape:
        base, tensors, return: all the same, any
    Raises:
        ShapeError: Different shapes.
        DataError: Not one finite weight per tensor, ``drop_rate`` outside [0, 1), or no whole ``seed``.
    Source: DARE, arXiv:2311.03099, section 3.2 (drop and rescale) with 3.3 (merging).
    """
    return Dare(drop_rate, seed).apply(tensors, weights, base=base, dtype=dtype)
