"""Task arithmetic: adds weighted task vectors (differences to the base)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sphinxkit.interpolation.method import Combine, MixMethod, Passes, register
from sphinxkit.interpolation.methods.linear import weighted_sum


def task_vectors(parts: Sequence[Tensor]) -> list[Tensor]:
    """``part_i - base`` for every part after the first, which is the base; in place.

    Shape:
        parts, return: all (N,)
    """
    return [part.sub_(parts[0]) for part in parts[1:]]


@register("task_arithmetic")
class TaskArithmetic(MixMethod):
    """Base plus weighted task vectors.

    Source: Editing models with task arithmetic, arXiv:2212.04089.
    """

    needs_base = True
    averages = False

    def default_weights(self, num_models: int) -> tuple[float, ...]:
        """1 for every task vector."""
        return (1.0,) * num_models

    def prepare(self, passes: Passes, weights: Sequence[float], name: str | None = None) -> Combine:
        """Combine by ``base + sum_i weights[i] * (part_i - base)``; the first part is the base."""
        return lambda _, parts: parts[0].add_(weighted_sum(task_vectors(parts), weights))


def task_arithmetic(
    base: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], dtype: torch.dtype | None = None
) -> Tensor:
    """Add scaled task vectors: ``base + sum_i weights[i] * (tensors[i] - base)``; a negative weight forgets a task.

    Args:
        base: The common ancestor.
        tensors: Models fine-tuned from the base.
        weights: One per tensor.
        dtype: Dtype of the result.
    Shape:
        base, tensors, return: all the same, any
    Raises:
        ShapeError: Different shapes.
        DataError: Not one finite weight per tensor.
    Source: Editing models with task arithmetic, arXiv:2212.04089, section 2.
    """
    return TaskArithmetic().apply(tensors, weights, base=base, dtype=dtype)
