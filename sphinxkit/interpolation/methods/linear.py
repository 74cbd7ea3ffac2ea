"""Weighted averages: linear, two models before and after fine-tuning (WiSE-FT), and the exponential moving average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sphinxkit.interpolation.method import Combine, MixMethod, Passes, check_fraction, normalized, register


def weighted_sum(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Sum of ``weights[i] * parts[i]``, in place in the first part that counts; parts of weight 0 are left out.

    Every product is rounded before it is added, so two parts give the same bits in either order.

    Args:
        parts: Overwritten.
        weights: One factor per part.
    Shape:
        parts, return: all (N,)
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


@register("linear")
class Linear(MixMethod):
    """Weighted average. Source: SPHINX, arXiv:2311.07575."""

    def prepare(self, passes: Passes, weights: Sequence[float], name: str | None = None) -> Combine:
        """Combine by ``sum_i weights[i] * part_i``."""
        return lambda _, parts: weighted_sum(parts, weights)


@register("wise_ft")
class WiseFt(Linear):
    """Two models, before and after fine-tuning.

    Beta is the weight of the first, the model before fine-tuning: the paper's ``1 - alpha``.

    Source: WiSE-FT, arXiv:2109.01903.
    """

    max_models = 2


@register("ema")
@dataclass(frozen=True)
class Ema(Linear):
    """Exponential moving average over the models in the order given, oldest first.

    Args:
        decay: Weight of the average so far at each step, in [0, 1].
    Raises:
        DataError: ``decay`` is outside [0, 1].
    Source: Polyak and Juditsky, SIAM J. Control Optim. 30 (1992) for averaging; Mean Teacher, arXiv:1703.01780,
        section 2, for the exponential form on weights.
    """

    decay: float = 0.9
    takes_weights = False

    def __post_init__(self) -> None:
        check_fraction("decay", self.decay)

    def default_weights(self, num_models: int) -> tuple[float, ...]:
        """What the average over the models, oldest first, gives to each."""
        later = ((1 - self.decay) * self.decay ** (num_models - 1 - index) for index in range(1, num_models))
        return (self.decay ** (num_models - 1), *later)


def linear(
    tensors: Sequence[Tensor], weights: Sequence[float], normalize: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    """Weighted sum of tensors: ``sum_i weights[i] * tensors[i]``; tensors of weight 0 are ignored.

    Args:
        tensors: One or more.
        weights: One per tensor; they need not sum to 1.
        normalize: Divide the weights by their sum first.
        dtype: Dtype of the result.
    Shape:
        tensors, return: all the same, any
    Raises:
        ShapeError: No tensors, or different shapes.
        DataError: Not one finite weight per tensor, or weights that sum to 0 with ``normalize``.
    Source: SPHINX, arXiv:2311.07575, section 3.1 (theta = beta * theta_real + (1 - beta) * theta_synthetic).
    """
    return Linear().apply(tensors, normalized(weights) if normalize else weights, dtype=dtype)


def lerp(a: Tensor, b: Tensor, t: float, dtype: torch.dtype | None = None) -> Tensor:
    """``(1 - t) * a + t * b``: ``a`` at 0, ``b`` at 1, bit for bit; outside [0, 1] it extrapolates.

    Args:
        a: At 0.
        b: At 1.
        t: Position between them.
        dtype: Dtype of the result.
    Shape:
        a, b, return: all the same, any
    Raises:
        ShapeError: Different shapes.
        DataError: ``t`` is not finite.
    Source: SPHINX, arXiv:2311.07575, section 3.1, with beta = 1 - t on the first model.
    """
    return linear((a, b), (1 - t, t), dtype=dtype)


def wise_ft(zero_shot: Tensor, fine_tuned: Tensor, alpha: float, dtype: torch.dtype | None = None) -> Tensor:
    """Weight-space ensemble of a model before and after fine-tuning: ``(1 - alpha) * zero_shot + alpha * fine_tuned``.

    Args:
        zero_shot: Before.
        fine_tuned: After.
        alpha: In [0, 1]; 0.5 is the paper's recommendation.
        dtype: Dtype of the result.
    Shape:
        zero_shot, fine_tuned, return: all the same, any
    Raises:
        ShapeError: Different shapes.
        DataError: ``alpha`` is outside [0, 1].
    Source: WiSE-FT, arXiv:2109.01903, section 3, equation 1.
    """
    check_fraction("alpha", alpha)
    return lerp(zero_shot, fine_tuned, alpha, dtype)


def ema(average: Tensor, tensor: Tensor, decay: float, dtype: torch.dtype | None = None) -> Tensor:
    """One step of an exponential moving average: ``decay * average + (1 - decay) * tensor``.

    Args:
        average: The average so far.
        tensor: The newest value.
        decay: In [0, 1]; 1 keeps the average, 0 replaces it.
        dtype: Dtype of the result.
    Shape:
        average, tensor, return: all the same, any
    Raises:
        ShapeError: Different shapes.
        DataError: ``decay`` is outside [0, 1].
    Source: Mean Teacher, arXiv:1703.01780, section 2.
    """
    check_fraction("decay", decay)
    return linear((average, tensor), (decay, 1 - decay), dtype=dtype)
