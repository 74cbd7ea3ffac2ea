from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sphinxkit import interpolation
from tests.interpolation.tensors import FP32_ROUNDING, random, vectors

SLERP_ROUNDING = 1e-5  # an angle of float32 vectors, then float32 products; values of order one


ARC_VS_LINE = 1e-6  # at the angle below which slerp turns linear both differ by 1e-8, the rest is float32 rounding


def slerp_oracle(a: Tensor, b: Tensor, t: float) -> Tensor:
    a, b = a.double(), b.double()
    angle = math.acos((a.flatten() @ b.flatten() / (a.norm() * b.norm())).item())
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.8])
def test_slerp_follows_the_arc(t: float) -> None:
    a, b = random(6, 4, seed=1), random(6, 4, seed=2)
    torch.testing.assert_close(
        interpolation.slerp(a, b, t).double(), slerp_oracle(a, b, t), atol=SLERP_ROUNDING, rtol=0
    )
    unit_a, unit_b = a / a.norm(), b / b.norm()
    assert interpolation.slerp(unit_a, unit_b, t).norm().item() == pytest.approx(1, abs=SLERP_ROUNDING)


def test_slerp_by_hand() -> None:
    # 30 of 90 degrees between the axes: (cos 30, sin 30)
    result = interpolation.slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 1 / 3)
    assert result.tolist() == pytest.approx([math.sqrt(3) / 2, 0.5], abs=FP32_ROUNDING)


@given(vectors(1), st.floats(0.01, 10), st.floats(0, 1))
def test_slerp_of_parallel_vectors_is_linear(tensors: list[Tensor], factor: float, t: float) -> None:
    a = tensors[0]
    b = a * factor
    torch.testing.assert_close(
        interpolation.slerp(a, b, t), interpolation.lerp(a, b, t), atol=1000 * ARC_VS_LINE, rtol=ARC_VS_LINE
    )


@pytest.mark.parametrize("factor", [0.0, -1.0, -2.5])
def test_slerp_is_defined_where_the_arc_is_not(factor: float) -> None:
    a = random(30, seed=3)
    assert torch.equal(interpolation.slerp(a, a * factor, 0.3), interpolation.lerp(a, a * factor, 0.3))
    assert torch.equal(interpolation.slerp(a * factor, a, 0.3), interpolation.lerp(a * factor, a, 0.3))
    assert torch.equal(interpolation.slerp(a * 0, a * 0, 0.3), a * 0)
