"""RMSNorm and SwiGLU, as LLaMA has them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Divide by the root mean square of the last axis, then scale.

    The division happens in float32 and its result is cast back to the input's dtype before it meets the weight; the
    order matters in 16 bit.

    Args:
        dim: Width of the last axis, D.
        eps: Added to the mean square.
    Shape:
        x: (..., D)
        return: (..., D), the dtype of ``x`` if the weight has it too
    Source: RMSNorm, arXiv:1910.07467, equation 4; the order of cast and weight is LLaMA's.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (..., D). Shape: as the class."""
        # without a weight torch computes in float32 and rounds once to x.dtype
        return F.rms_norm(x, x.shape[-1:], None, self.eps) * self.weight

    def extra_repr(self) -> str:
        """Width and eps, for ``print(model)``."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class SwiGLU(nn.Module):
    """LLaMA's feed-forward layer: ``down(silu(gate(x)) * up(x))``, no biases.

    Args:
        embed_dim: Width in and out, D.
        hidden_dim: Width of the gate.
    Shape:
        x: (..., D)
        return: (..., D)
    Source: GLU variants, arXiv:2002.05202, equation 6; LLaMA, arXiv:2302.13971, section 2.2. LLaMA's published
        checkpoints call the three matrices w1 (gate), w3 (up) and w2 (down).
    """

    def __init__(self, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(embed_dim, hidden_dim, bias=False)
        self.up_proj = nn.Linear(embed_dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, embed_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to every token of ``x`` (..., D). Shape: as the class."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out
