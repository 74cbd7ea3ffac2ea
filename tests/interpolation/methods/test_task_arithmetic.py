from __future__ import annotations

import math

import torch

from sphinxkit import interpolation
from tests.interpolation.tensors import FP32_ROUNDING, random


def test_task_arithmetic_adds_and_forgets() -> None:
    base, a, b = (random(8, 3, seed=seed) for seed in range(3))
    oracle = base.double() + 0.7 * (a.double() - base.double()) - 0.4 * (b.double() - base.double())
    result = interpolation.task_arithmetic(base, [a, b], [0.7, -0.4])
    torch.testing.assert_close(result.double(), oracle, atol=FP32_ROUNDING, rtol=0)


def test_nothing_to_add_is_the_base_bit_for_bit() -> None:
    base = torch.tensor([-0.0, 1e-45, 3.0])
    other = torch.tensor([1.0, 2.0, math.nan])
    for result in (
        interpolation.ties(base, [other], [0.0]),
        interpolation.ties(base, [other], scale=0.0),
        interpolation.ties(base, []),
        interpolation.dare(base, [other], [0.0]),
        interpolation.dare(base, [], []),
        interpolation.task_arithmetic(base, [other], [0.0]),
    ):
        assert torch.equal(result.view(torch.int32), base.view(torch.int32))
        assert result.data_ptr() != base.data_ptr()
