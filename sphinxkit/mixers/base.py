"""Interfaces and registry of mixers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from sphinxkit.features import VisionFeatures
from sphinxkit.registry import Registry


class FeatureMixer(Protocol):
    """Protocol of a vision branch's mixer of encoders; ``ChannelMixer`` implements it."""

    @property
    def embed_dim(self) -> int:
        """Width of the mixed tokens."""
        ...

    def __call__(self, features: Sequence[VisionFeatures], *, is_tile: bool = False) -> VisionFeatures:
        """Mix one feature per encoder.

        Args:
            features: In the encoders' order.
            is_tile: The views are sub-images.
        Shape:
            features: prefix (B, P_i, D_i), patches (B, H_i*W_i, D_i)
            return: prefix (B, P, D), patches (B, H*W, D)
        """
        ...

    def num_tokens(
        self, prefix_counts: Sequence[int], grids: Sequence[tuple[int, int]], *, is_tile: bool = False
    ) -> int:
        """Tokens of one mixed view, P + H*W.

        Args:
            prefix_counts: P_i of each encoder.
            grids: (H_i, W_i) of each encoder.
            is_tile: The view is a sub-image.
        """
        ...


class TokenMixer(Protocol):
    """Protocol of a vision tower's mixer of branches; ``SequenceMixer`` implements it."""

    def __call__(self, tokens: Sequence[Tensor]) -> Tensor:
        """Join the branches' tokens.

        Shape:
            tokens: one (B, N_i, D) per branch
            return: (B, N, D)
        """
        ...

    def num_tokens(self, counts: Sequence[int]) -> int:
        """N, from each branch's N_i."""
        ...


registry: Registry[nn.Module] = Registry("mixer")
register = registry.register
create = registry.build
names = registry.names
