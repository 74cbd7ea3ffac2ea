"""Mixing methods as pure functions of tensors.

Every function accumulates in float32 (float64 if an input is float64), leaves its inputs alone and returns the dtype
asked for (by default the inputs' common one). Where a result is one of the inputs by definition (``t`` of 0 or 1, one
weight of 1 and the others 0), it is that input bit for bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sphinxkit.errors import DataError, ShapeError
from sphinxkit.interpolation.kernels import (
    Combine,
    Passes,
    dare_kernel,
    linear_kernel,
    slerp_kernel,
    task_kernel,
    ties_kernel,
)

SUM_TOLERANCE = 1e-6  # how far weights may be from 1 in total and still count as an average: decimal fractions as typed


def one_hot(weights: Sequence[float]) -> int | None:
    """Index of the only non-zero weight if it is exactly 1, else None."""
    used = [index for index, weight in enumerate(weights) if weight != 0]
    return used[0] if len(used) == 1 and weights[used[0]] == 1 else None


def common_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The dtype that holds every one of ``dtypes`` (float16 with bfloat16 gives float32)."""
    return functools.reduce(torch.promote_types, dtypes)


def accumulation_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """float64 if an input is float64, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def check_weights(weights: Sequence[float], count: int) -> tuple[float, ...]:
    """The weights as floats.

    Raises:
        DataError: Not one weight per tensor, or a weight is NaN or infinite.
    """
    if len(weights) != count:
        raise DataError(f"{len(weights)} weights were given for {count} tensors")
    if not all(math.isfinite(weight) for weight in weights):
        raise DataError(f"weights must be finite, got {list(weights)}")
    return tuple(float(weight) for weight in weights)


def check_fraction(name: str, value: float, *, low_open: bool = False, high_open: bool = False) -> None:
    """Raise unless ``value`` lies in [0, 1], without an end point that is open.

    Raises:
        DataError: The message names the value and the interval.
    """
    if (
        not isinstance(value, (int, float))
        or not 0 <= value <= 1
        or (low_open and value == 0)
        or (high_open and value == 1)
    ):
        interval = f"{'(' if low_open else '['}0, 1{')' if high_open else ']'}"
        raise DataError(f"{name} must be in {interval}, got {value!r}")


def check_number(name: str, value: float, *, whole: bool = False) -> None:
    """Raise unless ``value`` is a finite number, or a whole one.

    Raises:
        DataError: The message names the value.
    """
    kinds = int if whole else (int, float)
    if not isinstance(value, kinds) or not math.isfinite(value):
        raise DataError(f"{name} must be a {'whole' if whole else 'finite'} number, got {value!r}")


def _apply(tensors: Sequence[Tensor], prepare: Callable[[Passes], Combine], dtype: torch.dtype | None) -> Tensor:
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if not tensors:
        raise ShapeError("there are no tensors to mix")
    if len(set(shapes)) > 1:
        raise ShapeError(f"tensors to mix must have one shape, got {', '.join(map(str, shapes))}")
    dtypes = [tensor.dtype for tensor in tensors]
    if not all(dtype.is_floating_point for dtype in dtypes):
        raise DataError(f"only floating point tensors can be mixed, got {', '.join(map(str, dtypes))}")
    work = accumulation_dtype(dtypes)

    def parts() -> list[Tensor]:
        return [tensor.detach().reshape(-1).to(work, copy=True) for tensor in tensors]

    def passes() -> Iterator[tuple[int, list[Tensor]]]:
        yield 0, parts()

    result = prepare(passes)(0, parts())
    return result.to(dtype or common_dtype(dtypes)).reshape(shapes[0])


def _copy(tensor: Tensor, tensors: Sequence[Tensor], dtype: torch.dtype | None) -> Tensor:
    if len({tuple(other.shape) for other in tensors}) > 1:
        shapes = ", ".join(str(tuple(other.shape)) for other in tensors)
        raise ShapeError(f"tensors to mix must have one shape, got {shapes}")
    return tensor.detach().to(dtype or common_dtype([other.dtype for other in tensors]), copy=True)


def linear(
    tensors: Sequence[Tensor], weights: Sequence[float], normalize: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    """Weighted sum of tensors: ``sum_i weights[i] * tensors[i]``; tensors of weight 0 are not looked at.

    Args:
        tensors: One or more of one shape.
        weights: One per tensor; they need not sum to 1.
        normalize: Divide the weights by their sum first.
        dtype: Of the result.
    Raises:
        ShapeError: No tensors, or different shapes.
        DataError: Not one finite weight per tensor, or weights that sum to 0 with ``normalize``.
    Source: SPHINX, arXiv:2311.07575, section 3.1 (theta = beta * theta_real + (1 - beta) * theta_synthetic).
    """
    weights = normalized(weights) if normalize else weights
    weights = check_weights(weights, len(tensors))
    chosen = one_hot(weights)
    if chosen is not None:
        return _copy(tensors[chosen], tensors, dtype)
    return _apply(tensors, lambda _: linear_kernel(weights), dtype)


def normalized(weights: Sequence[float]) -> tuple[float, ...]:
    """The weights divided by their sum.

    Raises:
        DataError: They sum to 0.
    """
    total = math.fsum(weights)
    if total == 0:
        raise DataError(f"weights {list(weights)} sum to 0 and cannot be normalised")
    return tuple(weight / total for weight in weights)


def lerp(a: Tensor, b: Tensor, t: float, dtype: torch.dtype | None = None) -> Tensor:
    """``(1 - t) * a + t * b``: ``a`` at 0, ``b`` at 1, bit for bit; outside [0, 1] it extrapolates.

    Args:
        a: Any shape.
        b: Same shape as ``a``.
        t: Position between them.
        dtype: Of the result.
    Raises:
        ShapeError: Different shapes.
        DataError: ``t`` is not finite.
    Source: SPHINX, arXiv:2311.07575, section 3.1, with beta = 1 - t on the first model.
    """
    return linear((a, b), (1 - t, t), dtype=dtype)


def wise_ft(zero_shot: Tensor, fine_tuned: Tensor, alpha: float, dtype: torch.dtype | None = None) -> Tensor:
    """Weight-space ensemble of a model before and after fine-tuning: ``(1 - alpha) * zero_shot + alpha * fine_tuned``.

    Args:
        zero_shot: Any shape.
        fine_tuned: Same shape.
        alpha: In [0, 1]; 0.5 is the paper's recommendation.
        dtype: Of the result.
    Raises:
        ShapeError: Different shapes.
        DataError: ``alpha`` is outside [0, 1].
    Source: WiSE-FT, arXiv:2109.01903, section 3, equation 1.
    """
    check_fraction("alpha", alpha)
    return lerp(zero_shot, fine_tuned, alpha, dtype)


def uniform_soup(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Mean of the tensors of several fine-tuned models.

    Args:
        tensors: One or more of one shape.
        dtype: Of the result.
    Raises:
        ShapeError: No tensors, or different shapes.
    Source: Model soups, arXiv:2203.05482, section 2.
    """
    if not tensors:
        raise ShapeError("there are no tensors to mix")
    return linear(tensors, [1 / len(tensors)] * len(tensors), dtype=dtype)


def ema(average: Tensor, tensor: Tensor, decay: float, dtype: torch.dtype | None = None) -> Tensor:
    """One step of an exponential moving average: ``decay * average + (1 - decay) * tensor``.

    Args:
        average: The average so far.
        tensor: The newest value, same shape.
        decay: In [0, 1]; 1 keeps the average, 0 replaces it.
        dtype: Of the result.
    Raises:
        ShapeError: Different shapes.
        DataError: ``decay`` is outside [0, 1].
    Source: Polyak and Juditsky, SIAM J. Control Optim. 30 (1992) for averaging; Mean Teacher, arXiv:1703.01780,
        section 2, for the exponential form on weights.
    """
    check_fraction("decay", decay)
    return linear((average, tensor), (decay, 1 - decay), dtype=dtype)


def ema_weights(count: int, decay: float) -> tuple[float, ...]:
    """Weights that an exponential moving average over ``count`` models, oldest first, gives to each."""
    check_fraction("decay", decay)
    return (decay ** (count - 1), *((1 - decay) * decay ** (count - 1 - index) for index in range(1, count)))


def slerp(a: Tensor, b: Tensor, t: float, dtype: torch.dtype | None = None) -> Tensor:
    """Spherical interpolation of two tensors taken as flat vectors.

    Linear where the arc is not defined (a zero vector, parallel or anti-parallel vectors).

    Args:
        a: Any shape.
        b: Same shape.
        t: 0 gives ``a``, 1 gives ``b``, bit for bit.
        dtype: Of the result.
    Raises:
        ShapeError: Different shapes.
        DataError: ``t`` is not finite.
    Source: Shoemake, SIGGRAPH 1985, doi:10.1145/325334.325242; lengths are not normalised, as usual for weights.
    """
    weights = check_weights((1 - t, t), 2)
    chosen = one_hot(weights)
    if chosen is not None:
        return _copy((a, b)[chosen], (a, b), dtype)
    return _apply((a, b), lambda passes: slerp_kernel(passes, t), dtype)


def task_arithmetic(
    base: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], dtype: torch.dtype | None = None
) -> Tensor:
    """Add scaled task vectors: ``base + sum_i weights[i] * (tensors[i] - base)``; a negative weight forgets a task.

    Args:
        base: The common ancestor.
        tensors: Fine-tuned from it, same shape.
        weights: One per tensor.
        dtype: Of the result.
    Raises:
        ShapeError: Different shapes.
        DataError: Not one finite weight per tensor.
    Source: Editing models with task arithmetic, arXiv:2212.04089, section 2.
    """
    weights = check_weights(weights, len(tensors))
    everything = (base, *tensors)
    chosen = one_hot(weights)
    if chosen is not None:
        return _copy(tensors[chosen], everything, dtype)
    if not any(weights):
        return _copy(base, everything, dtype)
    return _apply(everything, lambda _: task_kernel(weights), dtype)


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
        tensors: Fine-tuned from it, same shape.
        weights: Of each tensor in votes and mean; default all 1, the paper's method.
        density: Fraction of each task vector that is kept, in (0, 1]; the paper keeps 20 %. The cut is per tensor
            given: pass a flattened model for the paper's whole-model cut. Equal magnitudes at the cut are all kept.
        scale: The paper's lambda.
        dtype: Of the result.
    Raises:
        ShapeError: Different shapes.
        DataError: Not one finite weight per tensor, ``density`` outside (0, 1], or ``scale`` is not finite.
    Source: TIES-Merging, arXiv:2306.01708, section 4, Algorithm 1.
    """
    weights = check_weights([1.0] * len(tensors) if weights is None else weights, len(tensors))
    check_fraction("density", density, low_open=True)
    check_number("scale", scale)
    everything = (base, *tensors)
    chosen = one_hot(weights)
    if chosen is not None and density == 1 and scale == 1:
        return _copy(tensors[chosen], everything, dtype)
    if not any(weights) or scale == 0:
        return _copy(base, everything, dtype)
    return _apply(everything, lambda passes: ties_kernel(passes, weights, density, scale), dtype)


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
        tensors: Fine-tuned from it, same shape.
        weights: One per tensor.
        drop_rate: Probability that an element is dropped, in [0, 1); the paper finds 0.9 harmless.
        seed: Same seed, same result, however the tensor is cut into chunks.
        dtype: Of the result.
    Raises:
        ShapeError: Different shapes.
        DataError: Not one finite weight per tensor, ``drop_rate`` outside [0, 1), or no whole ``seed``.
    Source: DARE, arXiv:2311.03099, section 3.2 (drop and rescale) with 3.3 (merging).
    """
    weights = check_weights(weights, len(tensors))
    check_fraction("drop_rate", drop_rate, high_open=True)
    check_number("seed", seed, whole=True)
    everything = (base, *tensors)
    chosen = one_hot(weights)
    if chosen is not None and drop_rate == 0:
        return _copy(tensors[chosen], everything, dtype)
    if not any(weights):
        return _copy(base, everything, dtype)
    return _apply(everything, lambda _: dare_kernel(weights, drop_rate, seed), dtype)


class Soup(NamedTuple):
    """What a greedy soup chose."""

    members: tuple[int, ...]
    """Indices of the models in the soup, in the order they were taken."""
    score: float
    """Score of the soup."""


def choose_soup(scores: Sequence[float], score_soup: Callable[[tuple[int, ...]], float]) -> Soup:
    """Greedy choice of the models to average, the best first; a model stays if the soup does not get worse.

    Args:
        scores: Score of each model alone on held-out data; higher is better.
        score_soup: Scores the uniform average of the models with these indices.
    Raises:
        DataError: No models, or a score is not a number.
    Source: Model soups, arXiv:2203.05482, section 2, Recipe 1.
    """
    if not scores:
        raise DataError("a greedy soup needs at least one model")
    for index, score in enumerate(scores):
        if math.isnan(score):
            raise DataError(f"the score of model {index} is not a number")
    first, *others = sorted(range(len(scores)), key=lambda index: -scores[index])
    soup = Soup((first,), scores[first])
    for index in others:
        members = (*soup.members, index)
        score = score_soup(members)
        if score >= soup.score:
            soup = Soup(members, score)
    return soup


def greedy_soup(
    models: Sequence[Mapping[str, Tensor]],
    score: Callable[[Mapping[str, Tensor]], float],
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, Tensor], Soup]:
    """Average of the fine-tuned models that help, chosen greedily by a score.

    Args:
        models: Tensors by name, the same names and shapes in each.
        score: Of a model on held-out data; higher is better.
        dtype: Of the result.
    Returns:
        The averaged tensors and the choice.
    Raises:
        DataError: No models, different names, or a score that is not a number.
        ShapeError: Different shapes.
    Source: Model soups, arXiv:2203.05482, section 2, Recipe 1.
    """
    for index, model in enumerate(models):
        if set(model) != set(models[0]):
            names = sorted(set(model) ^ set(models[0]))
            raise DataError(f"model {index} and model 0 do not hold the same tensors: {', '.join(names[:5])}")

    def average(members: Sequence[int]) -> dict[str, Tensor]:
        return {name: uniform_soup([models[index][name] for index in members], dtype) for name in models[0]}

    soup = choose_soup([score(model) for model in models], lambda members: score(average(members)))
    return average(soup.members), soup
