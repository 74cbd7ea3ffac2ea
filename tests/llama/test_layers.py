from __future__ import annotations

import torch

from sphinxkit.llama import RMSNorm, SwiGLU

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
