from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sphinxkit import interpolation
from sphinxkit.errors import DataError, ShapeError
from tests.interpolation.tensors import DTYPES, FP32_ROUNDING, random, same_bits, vectors


@pytest.mark.parametrize("dtype", DTYPES)
def test_end_points_are_bitwise(dtype: torch.dtype) -> None:
    a, b, base = (random(4, 6, seed=seed, dtype=dtype) for seed in range(3))
    a[0, 0], b[0, 0] = -0.0, math.nan
    for op in (interpolation.lerp, interpolation.slerp, interpolation.wise_ft):
        assert same_bits(op(a, b, 0), a)
        assert same_bits(op(a, b, 1), b)
    assert same_bits(interpolation.linear((a, b, base), (0, 1, 0)), b)
    assert same_bits(interpolation.ema(a, b, 1), a)
    assert same_bits(interpolation.ema(a, b, 0), b)
    assert same_bits(interpolation.task_arithmetic(base, [a, b], [1, 0]), a)
    assert same_bits(interpolation.task_arithmetic(base, [a, b], [0, 0]), base)
    assert same_bits(interpolation.ties(base, [a, b], [0, 1], density=1), b)
    assert same_bits(interpolation.dare(base, [a, b], [0, 1], drop_rate=0), b)
    assert same_bits(interpolation.uniform_soup([a]), a)
    assert interpolation.lerp(a, b, 0).data_ptr() != a.data_ptr()


@given(vectors(2), st.floats(0, 1))
def test_two_models_in_either_order_give_the_same_bits(tensors: list[Tensor], t: float) -> None:
    a, b = tensors
    assert same_bits(interpolation.linear((a, b), (1 - t, t)) + 0.0, interpolation.linear((b, a), (t, 1 - t)) + 0.0)


@given(vectors(3), st.lists(st.floats(-1, 1), min_size=3, max_size=3))
def test_order_does_not_matter(tensors: list[Tensor], weights: list[float]) -> None:
    results = [
        interpolation.linear([tensors[i] for i in order], [weights[i] for i in order])
        for order in itertools.permutations(range(3))
    ]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=300 * FP32_ROUNDING, rtol=0)  # sums of up to 300


def test_inputs_are_left_alone() -> None:
    base, a, b = (random(20, seed=seed) for seed in range(3))
    copies = [t.clone() for t in (base, a, b)]
    interpolation.lerp(a, b, 0.5), interpolation.slerp(a, b, 0.5), interpolation.task_arithmetic(base, [a, b], [1, 1])
    interpolation.ties(base, [a, b]), interpolation.dare(base, [a, b], [1, 1])
    for tensor, copy in zip((base, a, b), copies, strict=True):
        assert same_bits(tensor, copy)


def test_empty_tensors_and_tensors_without_order() -> None:
    assert interpolation.lerp(torch.empty(0, 3), torch.empty(0, 3), 0.5).shape == (0, 3)
    a, b = random(4, 5, seed=1), random(4, 5, seed=2)
    assert torch.equal(interpolation.lerp(a.T, b.T, 0.3), interpolation.lerp(a, b, 0.3).T)
    assert interpolation.ties(torch.empty(0), [torch.empty(0)]).shape == (0,)


def test_shapes_must_agree() -> None:
    with pytest.raises(ShapeError, match=r"one shape, got \(2,\), \(3,\)"):
        interpolation.lerp(torch.zeros(2), torch.zeros(3), 0.5)
    with pytest.raises(ShapeError, match=r"one shape, got \(2,\), \(3,\)"):
        interpolation.lerp(torch.zeros(2), torch.zeros(3), 0)
    with pytest.raises(ShapeError, match="no tensors"):
        interpolation.linear([], [])
    with pytest.raises(ShapeError, match="no tensors"):
        interpolation.uniform_soup([])


def test_weights_must_be_usable() -> None:
    a = torch.zeros(2)
    with pytest.raises(DataError, match="1 weights were given for 2 tensors"):
        interpolation.linear([a, a], [1.0])
    with pytest.raises(DataError, match="must be finite"):
        interpolation.lerp(a, a, math.nan)
    with pytest.raises(DataError, match="sum to 0"):
        interpolation.linear([a, a], [1, -1], normalize=True)
    with pytest.raises(DataError, match=r"alpha must be in \[0, 1\], got 1.5"):
        interpolation.wise_ft(a, a, 1.5)
    with pytest.raises(DataError, match=r"decay must be in \[0, 1\]"):
        interpolation.ema(a, a, -0.1)
    with pytest.raises(DataError, match=r"density must be in \(0, 1\]"):
        interpolation.ties(a, [a], density=0)
    with pytest.raises(DataError, match=r"drop_rate must be in \[0, 1\)"):
        interpolation.dare(a, [a], [1.0], drop_rate=1)
