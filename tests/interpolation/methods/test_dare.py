from __future__ import annotations

import math

import pytest
import torch

from sphinxkit import interpolation
from sphinxkit.interpolation.method import BLOCK
from tests.interpolation.tensors import random, same_bits


def test_dare_drops_and_rescales() -> None:
    base, tuned = torch.full((40_000,), 2.0), torch.full((40_000,), 3.0)
    result = interpolation.dare(base, [tuned], [1.0], drop_rate=0.75, seed=5)
    assert set(result.unique().tolist()) == {2.0, 6.0}  # kept differences of 1 become 1 / (1 - 0.75) = 4
    kept = (result == 6.0).double().mean().item()
    assert kept == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / 40_000))  # five standard deviations
    assert same_bits(result, interpolation.dare(base, [tuned], [1.0], drop_rate=0.75, seed=5))
    assert not torch.equal(result, interpolation.dare(base, [tuned], [1.0], drop_rate=0.75, seed=6))


def test_dare_without_dropping_is_task_arithmetic_and_models_draw_on_their_own() -> None:
    base, a, b = (random(500, seed=seed) for seed in range(3))
    torch.testing.assert_close(
        interpolation.dare(base, [a, b], [0.5, 0.5], drop_rate=0.0),
        interpolation.task_arithmetic(base, [a, b], [0.5, 0.5]),
    )
    both = interpolation.dare(torch.zeros(5000), [torch.ones(5000), torch.ones(5000)], [1.0, 10.0], drop_rate=0.5)
    assert set(both.unique().tolist()) == {0.0, 2.0, 20.0, 22.0}


def test_dare_draws_anew_in_every_block() -> None:
    base, tuned = torch.zeros(2 * BLOCK), torch.ones(2 * BLOCK)
    result = interpolation.dare(base, [tuned], [1.0], drop_rate=0.5)
    assert not torch.equal(result[:BLOCK], result[BLOCK:])
