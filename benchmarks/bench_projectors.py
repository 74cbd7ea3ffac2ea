"""Projectors: the linear layer and norm from encoder width to LLM width, and a two-layer MLP."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.harness import Case, Context, Work, nbytes

QUICK = True
# bf16 has 8 bits of mantissa: two kernels that sum in another order differ by a few thousandths at most.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def cases(context: Context) -> Iterator[Case]:
    from sphinxkit.projectors import LinearProjector, MLPProjector

    in_dim, out_dim = context.pick((5632, 5120), (12, 8))  # CLIP-L + ConvNeXt-XXL + DINOv2-g -> LLaMA-2 13B
    tokens = context.pick(5 * 257, 7, 257)  # the five views of one SPHINX-1k image; quick: one view
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        linear = LinearProjector(in_dim, out_dim, norm="layer").to(context.device, dtype)
        plain = nn.Sequential(nn.Linear(in_dim, out_dim), nn.LayerNorm(out_dim)).to(context.device, dtype)
        plain.load_state_dict(dict(zip(plain.state_dict(), linear.state_dict().values(), strict=True)))
        inputs = [(context.randn(1, tokens, in_dim, dtype=dtype),) for _ in range(2)]
        output = tokens * out_dim * inputs[0][0].element_size()
        yield Case(
            f"linear {in_dim} to {out_dim}, {tokens} tokens, {name}",
            {"sphinxkit": linear, "torch nn.Sequential": plain},
            Work(2 * tokens * in_dim * out_dim, nbytes(linear, inputs[0]), output, dtype=dtype),
            inputs,
            amount=tokens,
            unit="tokens",
            tolerance=TOLERANCE[dtype],
        )
        mlp = MLPProjector(in_dim, out_dim, num_layers=2).to(context.device, dtype)
        layers = [module for module in mlp.modules() if isinstance(module, nn.Linear)]
        plain = nn.Sequential(layers[0], nn.GELU(), layers[1])
        yield Case(
            f"mlp {in_dim} to {out_dim}, {tokens} tokens, {name}",
            {"sphinxkit": mlp, "torch nn.Sequential": plain},
            Work(2 * tokens * (in_dim * out_dim + out_dim**2), nbytes(mlp, inputs[0]), output, dtype=dtype),
            inputs,
            amount=tokens,
            unit="tokens",
            tolerance=TOLERANCE[dtype],
        )
