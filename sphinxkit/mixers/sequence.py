"""Mixing branches along the sequence axis."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sphinxkit.errors import ShapeError
from sphinxkit.mixers.base import register


@register("sequence")
class SequenceMixer(nn.Module):
    """Put the tokens of several branches one after another, in the order given.

    Shape:
        tokens: one (B, N_i, D) per branch
        return: (B, sum N_i, D)
    Raises:
        ShapeError: No tokens at all, a tensor is not (B, N, D), or batch sizes or widths differ.
    Source: SPHINX, arXiv:2311.07575, section 3.1 (Q-Former tokens before the channel-mixed ones).
    """

    def __init__(self) -> None:  # nn.Module's own takes anything, and a recipe's options are checked by the signature
        super().__init__()

    def forward(self, tokens: Sequence[Tensor]) -> Tensor:
        """Join the branches' tokens. Shape: as the class."""
        shapes = [tuple(branch.shape) for branch in tokens]
        if not shapes:
            raise ShapeError("sequence mixer: expected at least one branch's tokens (B, N, D), got none")
        if any(len(shape) != 3 for shape in shapes) or len({(shape[0], shape[-1]) for shape in shapes}) > 1:
            raise ShapeError(f"sequence mixer: expected (B, N_i, D) with one B and one D, got {shapes}")
        return tokens[0] if len(tokens) == 1 else torch.cat(list(tokens), dim=1)

    def num_tokens(self, counts: Sequence[int]) -> int:
        """Tokens of one view: the sum of the branches' counts."""
        return sum(counts)
