from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sphinxkit import interpolation
from sphinxkit.errors import DataError
from tests.interpolation.tensors import DTYPES, FP32_ROUNDING, random, vectors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [-0.5, 0.25, 0.5, 0.9, 1.5])
def test_lerp_is_the_weighted_sum(dtype: torch.dtype, t: float) -> None:
    a, b = random(7, 5, seed=1, dtype=dtype), random(7, 5, seed=2, dtype=dtype)
    oracle = (1 - t) * a.double() + t * b.double()
    torch.testing.assert_close(
        interpolation.lerp(a, b, t), oracle.to(dtype), atol=FP32_ROUNDING, rtol=torch.finfo(dtype).eps
    )
    torch.testing.assert_close(interpolation.wise_ft(a, b, 0.3), interpolation.lerp(a, b, 0.3), atol=0, rtol=0)


def test_linear_accumulates_in_float32_and_gives_the_dtype_asked_for() -> None:
    tensors = [random(50, seed=seed, dtype=torch.bfloat16) for seed in range(5)]
    weights = [0.1, 0.25, -0.3, 0.55, 0.4]
    oracle = sum(w * t.double() for w, t in zip(weights, tensors, strict=True))
    result = interpolation.linear(tensors, weights, dtype=torch.float32)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), oracle, atol=FP32_ROUNDING, rtol=0)
    torch.testing.assert_close(
        interpolation.linear(tensors, weights, normalize=True, dtype=torch.float32).double(),
        oracle,
        atol=FP32_ROUNDING,
        rtol=0,
    )
    assert interpolation.linear(tensors, weights).dtype == torch.bfloat16
    assert interpolation.linear([tensors[0], tensors[1].half()], (0.5, 0.5)).dtype == torch.float32


def test_normalize_divides_by_the_sum() -> None:
    a, b = random(9, seed=1), random(9, seed=2)
    oracle = 0.75 * a.double() + 0.25 * b.double()
    torch.testing.assert_close(
        interpolation.linear((a, b), (3, 1), normalize=True).double(), oracle, atol=FP32_ROUNDING, rtol=0
    )


def test_float64_inputs_are_accumulated_in_float64() -> None:
    a, b = torch.tensor([1.0 + 1e-12], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
    assert interpolation.lerp(a, b, 0.5).item() == pytest.approx(1.0 + 5e-13, abs=2e-16)


@given(vectors(3), st.lists(st.floats(0.1, 1), min_size=3, max_size=3))
def test_linear_is_associative_within_rounding(tensors: list[Tensor], weights: list[float]) -> None:
    first = weights[0] + weights[1]
    pair = interpolation.linear(tensors[:2], [weights[0] / first, weights[1] / first])
    nested = interpolation.linear([pair, tensors[2]], [first, weights[2]])
    torch.testing.assert_close(nested, interpolation.linear(tensors, weights), atol=300 * FP32_ROUNDING, rtol=0)


def test_only_floating_point_is_mixed() -> None:
    with pytest.raises(DataError, match="only floating point"):
        interpolation.lerp(torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64), 0.5)
