from __future__ import annotations

import cmath
import math

import pytest
import torch

from sphinxkit.llama import apply_rope, precompute_freqs_cis
from sphinxkit.llama.rope import rotate_pairs

FP32_TOLERANCE = 2e-6  # a handful of float32 roundings (6e-8 each) of numbers up to about 5


@pytest.mark.parametrize(("theta", "scaling"), [(10000.0, None), (500.0, None), (10000.0, 0.25)])
def test_rope_turns_neighbouring_pairs_by_the_papers_angle(theta: float, scaling: float | None) -> None:
    positions = torch.tensor([[0, 1, 37], [4, 9, 4000]])
    x = torch.randn(2, 3, 2, 6, generator=torch.Generator().manual_seed(0))
    turned = apply_rope(x, precompute_freqs_cis(positions, 6, theta, scaling))
    for row in range(2):
        for column in range(3):
            position = float(positions[row, column]) * (scaling or 1.0)
            # float32 rounds the angle and its frequency to 2^-24 of themselves
            tolerance = FP32_TOLERANCE + position * 2.0**-22
            for head in range(2):
                for pair in range(3):
                    old = complex(*x[row, column, head, 2 * pair : 2 * pair + 2].tolist())
                    new = complex(*turned[row, column, head, 2 * pair : 2 * pair + 2].tolist())
                    exact = old * cmath.exp(1j * position * theta ** (-2 * pair / 6))
                    assert math.isclose(abs(new - exact), 0.0, abs_tol=tolerance)


def test_rope_of_bf16_is_computed_in_fp32_and_rounded_once() -> None:
    x = torch.randn(1, 5, 1, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    freqs_cis = precompute_freqs_cis(torch.arange(3000, 3005)[None], 8)
    assert freqs_cis.dtype == torch.complex64
    turned = apply_rope(x, freqs_cis)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, apply_rope(x.float(), freqs_cis).to(torch.bfloat16))


def test_rope_is_differentiable_and_its_gradient_is_the_rotation_back() -> None:
    x = torch.randn(1, 4, 2, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    freqs_cis = precompute_freqs_cis(torch.arange(4)[None], 6)
    weight = torch.randn(1, 4, 2, 6, generator=torch.Generator().manual_seed(1))
    (apply_rope(x, freqs_cis) * weight).sum().backward()
    torch.testing.assert_close(x.grad, apply_rope(weight, freqs_cis.conj()), atol=FP32_TOLERANCE, rtol=FP32_TOLERANCE)


def test_pairs_of_real_numbers_turn_as_complex_ones_do() -> None:
    x = torch.randn(2, 4, 2, 6, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 3, 700, 9], [1, 2, 3, 4]])
    pairs = precompute_freqs_cis(positions, 6, as_pairs=True)
    assert pairs.shape == (2, 4, 1, 3, 2)
    expected = apply_rope(x, precompute_freqs_cis(positions, 6))
    torch.testing.assert_close(rotate_pairs(x, pairs), expected, atol=FP32_TOLERANCE, rtol=0)
    torch.testing.assert_close(apply_rope(x, pairs), expected, atol=FP32_TOLERANCE, rtol=0)
