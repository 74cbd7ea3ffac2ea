"""One branch of the vision tower: encoders, mixer, projector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from sphinxkit.encoders.base import Encoder
from sphinxkit.errors import ShapeError
from sphinxkit.features import VisionFeatures

# Pixels that a CPU encodes at once where ``max_views`` is given. Larger batches need memory beyond what malloc keeps;
# the kernel maps and clears it again for every layer. ConvNeXt-XXL in bfloat16 on five views of 512, one thread: all
# at once 40.6 s in the process and 4.9 s in the kernel (2.0 M page faults), two at a time 40.2 s and 1.4 s (0.7 M).
CPU_PIXELS = 2 * 512 * 512


class VisionBranch(nn.Module):
    """Encoders whose features are mixed on one grid and projected to the language model's width.

    Args:
        encoders: Run on the same views, in order.
        projector: (..., sum of widths) -> (..., D). A projector that changes the number of tokens has a method
            ``num_tokens(count) -> int`` that returns the number of output tokens.
        mixer: Joins the encoders' features (see ``sphinxkit.mixers.base.FeatureMixer``); may be None for one encoder.
        tile_sizes: Side in pixels of each encoder's views; None: the tiler's own.
    Shape:
        views: one (B, V, 3, T_i, T_i) per encoder
        return: one (B, V_g, N_g, D) per group of views with the same number of tokens, in view order
    Raises:
        ShapeError: Several encoders without a mixer, a mixer without ``num_tokens``, or lists of different lengths.
    Source: SPHINX, arXiv:2311.07575, section 3.1; LLaMA2-Accessory, accessory/model/LLM/llama_ens5.py, encode_image.
    """

    def __init__(
        self,
        encoders: Sequence[Encoder],
        projector: nn.Module,
        mixer: nn.Module | None = None,
        tile_sizes: Sequence[int | None] | None = None,
    ) -> None:
        super().__init__()
        if mixer is None and len(encoders) != 1:
            raise ShapeError(f"vision branch: {len(encoders)} encoders need a mixer")
        if mixer is not None and not hasattr(mixer, "num_tokens"):
            raise ShapeError(
                f"vision branch: the mixer {type(mixer).__name__} has no method num_tokens(prefix_counts, grids, *, "
                "is_tile); see sphinxkit.mixers.base.FeatureMixer"
            )
        self.tile_sizes = tuple(tile_sizes) if tile_sizes is not None else (None,) * len(encoders)
        if len(self.tile_sizes) != len(encoders):
            raise ShapeError(f"vision branch: {len(encoders)} encoders but {len(self.tile_sizes)} tile sizes")
        self.encoders: Sequence[Encoder] = nn.ModuleList(encoders)  # type: ignore[assignment]
        self.mixer = mixer
        self.projector = projector

    @property
    def is_pooled(self) -> bool:
        """Whether the mixer treats sub-images differently from the whole image."""
        return getattr(self.mixer, "tile_pool", 1) != 1

    def num_tokens(self, is_tile: bool) -> int:
        """Tokens of one view, computed from the encoders' facts without running them.

        Args:
            is_tile: The view is a sub-image.
        Raises:
            ShapeError: The encoders' grids or prefix counts do not fit together.
        """
        counts = [encoder.num_prefix_tokens for encoder in self.encoders]
        grids = [encoder.grid_size for encoder in self.encoders]
        if self.mixer is None:
            count = counts[0] + grids[0][0] * grids[0][1]
        else:
            mixer: Any = self.mixer
            count = mixer.num_tokens(counts, grids, is_tile=is_tile)
        projector: Any = self.projector
        return int(projector.num_tokens(count) if hasattr(projector, "num_tokens") else count)

    def forward(
        self, views: Sequence[Tensor], groups: Sequence[tuple[slice, bool]], max_views: int | None = None
    ) -> list[Tensor]:
        """Encode all views, then mix and project them group by group. Shape: as the class.

        Args:
            views: For each encoder, the views at its tile size.
            groups: For each group, its views and whether they are sub-images.
            max_views: Maximum number of views per encoder pass; None: all views at once.
        Raises:
            ShapeError: The number of tokens of a view differs from ``num_tokens``.
        """
        batch_size, num_views = views[0].shape[:2]
        features = [
            _encode(encoder, view.flatten(0, 1), max_views) for encoder, view in zip(self.encoders, views, strict=True)
        ]
        tokens = []
        for selected, is_tile in groups:
            found = self.project([_select(feature, batch_size, num_views, selected) for feature in features], is_tile)
            if found.shape[1] != self.num_tokens(is_tile):
                raise ShapeError(
                    f"vision branch: {found.shape[1]} tokens of a view came, num_tokens says "
                    f"{self.num_tokens(is_tile)}; a mixer or projector that changes their number must say so"
                )
            tokens.append(rearrange(found, "(b v) n d -> b v n d", b=batch_size))
        return tokens

    def project(self, features: Sequence[VisionFeatures], is_tile: bool) -> Tensor:
        """Mix one feature per encoder and project the result.

        Args:
            features: In the encoders' order.
            is_tile: The views are sub-images.
        Shape:
            features: prefix (B, P_i, D_i), patches (B, H_i*W_i, D_i)
            return: (B, N, D)
        """
        mixed = features[0] if self.mixer is None else self.mixer(features, is_tile=is_tile)
        weight = next(self.projector.parameters(), None)
        tokens = mixed.tokens() if weight is None else mixed.tokens().to(weight.dtype)
        projected: Tensor = self.projector(tokens)
        return projected


def _encode(encoder: Encoder, views: Tensor, max_views: int | None) -> VisionFeatures:
    """Features of (B, 3, T, T) views, at most ``max_views`` of them at once (on a CPU, fewer where they are large)."""
    if max_views is not None and views.device.type == "cpu":
        max_views = min(max_views, max(1, CPU_PIXELS // views[0, 0].numel()))
    if max_views is None or len(views) <= max_views:
        features: VisionFeatures = encoder(views)
        return features
    parts = [encoder(part) for part in torch.split(views, max_views)]
    prefix, patches = (torch.cat([getattr(part, name) for part in parts]) for name in ("prefix", "patches"))
    return VisionFeatures(prefix, patches, parts[0].grid)


def _select(features: VisionFeatures, batch_size: int, num_views: int, views: slice) -> VisionFeatures:
    if len(range(*views.indices(num_views))) == num_views:
        return features

    def take(tokens: Tensor) -> Tensor:
        """Shape: tokens: (B*V, N, D); return: the same with the chosen views alone."""
        return rearrange(rearrange(tokens, "(b v) n d -> b v n d", b=batch_size)[:, views], "b v n d -> (b v) n d")

    return VisionFeatures(take(features.prefix), take(features.patches), features.grid)
