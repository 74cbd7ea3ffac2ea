"""Spherical interpolation of two models, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sphinxkit.interpolation.method import Combine, MixMethod, Passes, register
from sphinxkit.interpolation.methods.linear import weighted_sum

PARALLEL_SINE = 1e-4  # below this |sin| slerp is linear: at this angle both agree to 1e-8, less than float32 resolves


@register("slerp")
class Slerp(MixMethod):
    """Two models on the arc between them, tensor by tensor.

    Source: Shoemake, SIGGRAPH 1985, doi:10.1145/325334.325242.
    """

    max_models = 2

    def prepare(self, passes: Passes, weights: Sequence[float], name: str | None = None) -> Combine:
        """Combine two parts on the arc between them; one pass finds the angle, in float64."""
        dot = square_a = square_b = 0.0
        for _, (a, b) in passes():
            a64, b64 = a.double(), b.double()
            dot += torch.dot(a64, b64).item()
            square_a += torch.dot(a64, a64).item()
            square_b += torch.dot(b64, b64).item()
        factors = slerp_coefficients(dot, math.sqrt(square_a), math.sqrt(square_b), weights[-1])
        return lambda _, parts: weighted_sum(parts, factors)


def slerp_coefficients(dot: float, norm_a: float, norm_b: float, t: float) -> tuple[float, float]:
    """Factors of the two vectors on the arc between their directions.

    Linear factors where the arc is not defined: a zero vector, parallel or anti-parallel vectors.

    Args:
        dot: Scalar product of the two vectors.
        norm_a: Length of the first.
        norm_b: Length of the second.
        t: Position on the arc, 0 at the first.
    """
    if norm_a == 0 or norm_b == 0 or not math.isfinite(dot):
        return 1 - t, t
    angle = math.acos(max(-1.0, min(1.0, dot / (norm_a * norm_b))))
    sine = math.sin(angle)
    if abs(sine) < PARALLEL_SINE:
        return 1 - t, t
    return math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine


def slerp(a: Tensor, b: Tensor, t: float, dtype: torch.dtype | None = None) -> Tensor:
    """Spherical interpolation of two tensors taken as flat vectors.

    Linear where the arc is not defined (a zero vector, parallel or anti-parallel vectors).

    Args:
        a: At 0, bit for bit.
        b: At 1, bit for bit.
        t: Position on the arc.
        dtype: Dtype of the result.
    Shape:
        a, b, return: all the same, any
    Raises:
        ShapeError: Different shapes.
        DataError: ``t`` is not finite.
    Source: Shoemake, SIGGRAPH 1985, doi:10.1145/325334.325242; lengths are not normalised, as usual for weights.
    """
    return Slerp().apply((a, b), (1 - t, t), dtype=dtype)
