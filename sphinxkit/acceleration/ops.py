"""A matrix product and the operations around it in a decoder layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class FusedOps:
    """What is done besides a matrix product: an RMS norm of its input, a gate of its output.

    Args:
        norm: Scale of each channel of the RMS norm, (I,); None: the input as it is.
        eps: Added to the mean square.
        gated: The first half of the matrix gives gates g and the second values u; the result is ``silu(g) * u``.
    """

    norm: Tensor | None = None
    eps: float = 0.0
    gated: bool = False

    def before(self, x: Tensor) -> Tensor:
        """The product's input, by torch's operators.

        Shape:
            x: (..., I)
            return: (..., I)
        """
        return x if self.norm is None else F.rms_norm(x, x.shape[-1:], None, self.eps) * self.norm

    def after(self, product: Tensor) -> Tensor:
        """What becomes of the product, by torch's operators; it may be overwritten.

        Shape:
            product: (..., O)
            return: (..., O), or (..., O/2) if gated
        """
        if not self.gated:
            return product
        gate, up = product.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)


PLAIN = FusedOps()
