from __future__ import annotations

import cmath
import math

import pytest
import torch

from sphinxkit.llama import RMSNorm, SwiGLU, apply_rope, precompute_freqs_cis

FP32_TOLERANCE = 2e-6  # a handful of float32 roundings (6e-8 each) of numbers up to about 5


def test_rms_norm_is_the_papers_formula() -> None:
    norm = RMSNorm(24, eps=1e-3)
    with torch.no_grad():
        norm.weight.uniform_(-2, 2, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1)) * 0.1  # small: eps must count
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x), exact.float(), atol=FP32_TOLERANCE, rtol=FP32_TOLERANCE)


def test_rms_norm_in_bf16_normalises_in_fp32_casts_and_then_scales() -> None:
    norm = RMSNorm(512).to(torch.bfloat16)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    x = (torch.randn(64, 512, generator=torch.Generator().manual_seed(1)) * 3).to(torch.bfloat16)
    normalised = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    cast_then_scale = normalised.to(torch.bfloat16) * norm.weight
    scale_then_cast = (normalised * norm.weight.float()).to(torch.bfloat16)
    assert not torch.equal(cast_then_scale, scale_then_cast)  # else this test could not tell them apart
    assert torch.equal(norm(x), cast_then_scale)


def test_rms_norm_shows_its_size() -> None:
    assert repr(RMSNorm(8, 1e-6)) == "RMSNorm(8, eps=1e-06)"


def test_swiglu_is_the_papers_formula() -> None:
    torch.manual_seed(0)
    layer = SwiGLU(12, 20)
    x = torch.randn(2, 3, 12)
    gate, up, down = (layer.get_submodule(f"{name}_proj").weight.double() for name in ("gate", "up", "down"))
    gated = x.double() @ gate.T
    exact = (gated / (1 + torch.exp(-gated)) * (x.double() @ up.T)) @ down.T
    torch.testing.assert_close(layer(x), exact.float(), atol=FP32_TOLERANCE, rtol=FP32_TOLERANCE)


@pytest.mark.parametrize(("theta", "scaling"), [(10000.0, None), (500.0, None), (10000.0, 0.25)])
def test_rope_turns_neighbouring_pairs_by_the_papers_angle(theta: float, scaling: float | None) -> None:
    positions = torch.tensor([[0, 1, 37], [4, 9, 4000]])
    x = torch.randn(2, 3, 2, 6, generator=torch.Generator().manual_seed(0))
    turned = apply_rope(x, precompute_freqs_cis(positions, 6, theta, scaling))
    for row in range(2):
        for column in range(3):
            position = float(positions[row, column]) * (scaling or 1.0)
            # float32 rounds the angle to 2^-24 of itself, and its frequency likewise
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
