"""Mixing methods as components: how many models they take, their default weights, and the kernel of one tensor."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sphinxkit.errors import DataError
from sphinxkit.interpolation import kernels
from sphinxkit.interpolation.ops import (
    SUM_TOLERANCE,
    check_fraction,
    check_number,
    check_weights,
    ema_weights,
    normalized,
    one_hot,
)

Prepare = Callable[[kernels.Passes, Sequence[float], str], kernels.Combine]


@dataclass(frozen=True)
class MixMethod:
    """A way to mix the tensors of one name.

    Attributes:
        name: Registered name.
        prepare: Makes the kernel of one tensor from passes over its chunks, the weights and the tensor's name.
        default_weights: Weights for a number of models where none are given; None if they must be given.
        needs_base: Whether a common ancestor takes part; its chunk then comes first.
        averages: Whether weights must sum to 1 and lie in [0, 1] unless extrapolation is asked for.
        max_models: Largest number of models, None for any.
        is_copy: Whether weights of one 1 and zeros give that model bit for bit.
        takes_weights: Whether weights can be chosen; where not, the default ones define the method.
    """

    name: str
    prepare: Prepare
    default_weights: Callable[[int], tuple[float, ...]] | None = None
    needs_base: bool = False
    averages: bool = True
    max_models: int | None = None
    is_copy: bool = True
    takes_weights: bool = True

    def weights(
        self, given: Sequence[float] | None, num_models: int, *, extrapolate: bool = False, normalize: bool = False
    ) -> tuple[float, ...]:
        """The weights to use, checked.

        Args:
            given: One per model, or None for the default.
            num_models: How many models are mixed, the base not counted.
            extrapolate: Allow weights outside [0, 1] and, for averages, any sum.
            normalize: Divide by the sum first.
        Raises:
            DataError: Weights are missing, too many or too few, not finite, outside [0, 1] or do not sum to 1, or the
                method sets others itself.
        """
        if self.max_models is not None and num_models > self.max_models:
            raise DataError(f"{self.name} takes at most {self.max_models} models, got {num_models}")
        if given is None:
            if self.default_weights is None:
                raise DataError(f"{self.name} needs a beta (for two models) or weights")
            return self.default_weights(num_models)
        weights = check_weights(given, num_models)
        if not self.takes_weights and self.default_weights is not None and weights != self.default_weights(num_models):
            raise DataError(
                f"{self.name} sets its weights itself: {list(self.default_weights(num_models))}, so beta or weights "
                f"{list(weights)} cannot be given; linear takes them"
            )
        if normalize:
            weights = normalized(weights)
        if not self.needs_base and not any(weights):
            raise DataError(f"{self.name}: every weight is 0")
        if not self.averages or extrapolate:
            return weights
        if any(not 0 <= weight <= 1 for weight in weights):
            raise DataError(
                f"weights {list(weights)} (beta) lie outside [0, 1]; say extrapolate (--extrapolate) to do so"
            )
        if abs(math.fsum(weights) - 1) > SUM_TOLERANCE:
            total = math.fsum(weights)
            raise DataError(f"weights {list(weights)} sum to {total:g}, not 1; say normalize or extrapolate")
        return weights

    def copy_of(self, weights: Sequence[float]) -> int | None:
        """Index of the model that the result is bit for bit (-1: the base), or None."""
        if self.needs_base and not any(weights):
            return -1
        return one_hot(weights) if self.is_copy else None


def _ones(count: int) -> tuple[float, ...]:
    return (1.0,) * count


def _mean(count: int) -> tuple[float, ...]:
    return (1 / count,) * count


def _linear(_: kernels.Passes, weights: Sequence[float], __: str) -> kernels.Combine:
    return kernels.linear_kernel(weights)


def linear() -> MixMethod:
    """Weighted average; see :func:`sphinxkit.interpolation.ops.linear`. Source: SPHINX, arXiv:2311.07575."""
    return MixMethod("linear", _linear)


def wise_ft() -> MixMethod:
    """Two models, before and after fine-tuning; see :func:`sphinxkit.interpolation.ops.wise_ft`.

    Beta is the weight of the first, the model before fine-tuning: the paper's ``1 - alpha``.

    Source: WiSE-FT, arXiv:2109.01903.
    """
    return MixMethod("wise_ft", _linear, max_models=2)


def uniform_soup() -> MixMethod:
    """Mean of any number of models; see :func:`sphinxkit.interpolation.ops.uniform_soup`. Source: arXiv:2203.05482."""
    return MixMethod("uniform_soup", _linear, default_weights=_mean, takes_weights=False)


def ema(decay: float = 0.9) -> MixMethod:
    """Exponential moving average over the models in the order given, oldest first.

    Args:
        decay: Weight of the average so far at each step, in [0, 1].
    Raises:
        DataError: ``decay`` is outside [0, 1].
    Source: Mean Teacher, arXiv:1703.01780; see :func:`sphinxkit.interpolation.ops.ema`.
    """
    check_fraction("decay", decay)
    return MixMethod("ema", _linear, default_weights=lambda count: ema_weights(count, decay), takes_weights=False)


def slerp() -> MixMethod:
    """Two models on the arc between them, tensor by tensor; see :func:`sphinxkit.interpolation.ops.slerp`.

    Source: Shoemake, SIGGRAPH 1985, doi:10.1145/325334.325242.
    """

    def prepare(passes: kernels.Passes, weights: Sequence[float], _: str) -> kernels.Combine:
        return kernels.slerp_kernel(passes, weights[-1])

    return MixMethod("slerp", prepare, max_models=2)


def task_arithmetic() -> MixMethod:
    """Base plus weighted task vectors; see :func:`sphinxkit.interpolation.ops.task_arithmetic`.

    Source: arXiv:2212.04089.
    """

    def prepare(_: kernels.Passes, weights: Sequence[float], __: str) -> kernels.Combine:
        return kernels.task_kernel(weights)

    return MixMethod("task_arithmetic", prepare, default_weights=_ones, needs_base=True, averages=False)


def ties(density: float = 0.2, scale: float = 1.0) -> MixMethod:
    """Trim, elect sign, merge, with the cut made tensor by tensor; see :func:`sphinxkit.interpolation.ops.ties`.

    Args:
        density: Fraction of each task vector that is kept, in (0, 1].
        scale: The paper's lambda.
    Raises:
        DataError: ``density`` is outside (0, 1], or ``scale`` is not finite.
    Source: TIES-Merging, arXiv:2306.01708.
    """
    check_fraction("density", density, low_open=True)
    check_number("scale", scale)

    def prepare(passes: kernels.Passes, weights: Sequence[float], _: str) -> kernels.Combine:
        return kernels.ties_kernel(passes, weights, density, scale)

    copies = density == 1 and scale == 1
    return MixMethod("ties", prepare, default_weights=_ones, needs_base=True, averages=False, is_copy=copies)


def tensor_seed(seed: int, name: str) -> int:
    """The seed with which :func:`dare` drops elements of the tensor called ``name``."""
    return seed * 2**32 + zlib.crc32(name.encode())


def dare(drop_rate: float = 0.9, seed: int = 0) -> MixMethod:
    """Drop and rescale task vectors; see :func:`sphinxkit.interpolation.ops.dare`.

    Args:
        drop_rate: Probability that an element is dropped, in [0, 1).
        seed: Each tensor draws with ``tensor_seed(seed, name)``.
    Raises:
        DataError: ``drop_rate`` is outside [0, 1), or ``seed`` is not a whole number.
    Source: DARE, arXiv:2311.03099.
    """
    check_fraction("drop_rate", drop_rate, high_open=True)
    check_number("seed", seed, whole=True)

    def prepare(_: kernels.Passes, weights: Sequence[float], name: str) -> kernels.Combine:
        return kernels.dare_kernel(weights, drop_rate, tensor_seed(seed, name))

    return MixMethod("dare", prepare, default_weights=_ones, needs_base=True, averages=False, is_copy=drop_rate == 0)
