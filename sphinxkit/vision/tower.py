"""The vision tower: from pixels to the visual tokens that the language model reads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from sphinxkit.errors import ShapeError
from sphinxkit.pixels import check_pixels
from sphinxkit.tilers.base import Tiler
from sphinxkit.vision.branch import VisionBranch

MAX_VIEWS = 40  # what callers who want answers encode at once: eight images of five views; our choice


class VisionTower(nn.Module):
    """Everything between pixels and the language model's input.

    The branches' tokens of a view are joined in sequence, between a learnt start token and a learnt end token (the
    image delimiters, shared by all views). Views are in the tiler's order.

    Args:
        branches: Branches, whose tokens have the language model's width.
        mixer: Joins the branches' tokens of a view (see ``sphinxkit.mixers.base.TokenMixer``).
        embed_dim: Width D of the language model.
        image_size: Side of the preprocessed image in pixels.
        tiler: Cuts the image into views.
    Shape:
        pixels: (B, 3, image_size, image_size), CLIP-normalised
        return: (B, N_img, D)
    Raises:
        ShapeError: The mixer has no ``num_tokens``, the pixels have another size, or ``max_views`` is not positive.
    Source: SPHINX, arXiv:2311.07575, sections 3.1 and 3.3; LLaMA2-Accessory, accessory/model/LLM/llama_ens5.py.
    """

    def __init__(
        self,
        branches: Sequence[VisionBranch],
        mixer: nn.Module,
        *,
        embed_dim: int,
        image_size: int,
        tiler: Tiler,
    ) -> None:
        super().__init__()
        if not hasattr(mixer, "num_tokens"):
            raise ShapeError(
                f"vision tower: the mixer {type(mixer).__name__} has no method num_tokens(counts); see "
                "sphinxkit.mixers.base.TokenMixer"
            )
        self.branches: Sequence[VisionBranch] = nn.ModuleList(branches)  # type: ignore[assignment]
        self.mixer = mixer
        self.image_size = image_size
        self.tiler = tiler
        self.start_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.end_token = nn.Parameter(torch.empty(1, 1, embed_dim))

    @property
    def image_delimiters(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The learnt start and end token around each view, (1, 1, D) each."""
        return self.start_token, self.end_token

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw the image delimiters from N(0, 0.02), our choice (as the language model's embeddings)."""
        for token in self.image_delimiters:
            nn.init.normal_(token, std=0.02, generator=generator)

    def freeze_encoders(self) -> None:
        """Take the encoders that are not trainable out of training, after other code has replaced their parameters."""
        for branch in self.branches:
            for encoder in branch.encoders:
                if not encoder.trainable:
                    encoder.requires_grad_(False)

    @property
    def groups(self) -> list[tuple[slice, bool]]:
        """Groups of neighbouring views that are treated alike: (views, whether they are sub-images)."""
        if not any(branch.is_pooled for branch in self.branches):
            return [(slice(0, self.tiler.num_views), False)]
        flags = self.tiler.is_tile
        starts = [view for view in range(len(flags)) if view == 0 or flags[view] != flags[view - 1]]
        return [(slice(start, stop), flags[start]) for start, stop in pairwise([*starts, len(flags)])]

    @property
    def num_tokens(self) -> int:
        """Number of visual tokens of one image, N_img, image delimiters included."""
        mixer: Any = self.mixer
        counts = (
            (mixer.num_tokens([branch.num_tokens(is_tile) for branch in self.branches]), views)
            for views, is_tile in self.groups
        )
        return sum((count + len(self.image_delimiters)) * (views.stop - views.start) for count, views in counts)

    def views(self, pixels: Tensor) -> dict[int | None, Tensor]:
        """Cut images into views, once for each tile size that an encoder needs.

        Args:
            pixels: CLIP-normalised images.
        Shape:
            pixels: (B, 3, image_size, image_size)
            return: by tile size T, (B, V, 3, T, T) each
        Raises:
            ShapeError: The pixels have another size.
        """
        check_pixels(pixels, "vision tower")
        if pixels.shape[-2:] != (self.image_size, self.image_size):
            raise ShapeError(
                f"vision tower: expected pixels of {self.image_size}x{self.image_size}, got "
                f"{pixels.shape[-2]}x{pixels.shape[-1]} (H x W); model.preprocess makes them"
            )
        sizes = {size for branch in self.branches for size in branch.tile_sizes}
        return {size: self.tiler.tile(pixels, size) for size in sizes}

    def forward(self, pixels: Tensor, max_views: int | None = None) -> Tensor:
        """Visual tokens of a batch of images, image delimiters included. Shape: as the class.

        Args:
            pixels: CLIP-normalised images.
            max_views: Maximum number of views per encoder pass, which bounds memory; None: all views at once. On a CPU,
                a bound also limits a pass to ``sphinxkit.vision.branch.CPU_PIXELS``, which is faster.
        Raises:
            ShapeError: The pixels have another size, or ``max_views`` is not positive.
        """
        if max_views is not None and max_views < 1:
            raise ShapeError(f"vision tower: max_views must be at least 1, or None; got {max_views}")
        views = self.views(pixels)
        groups = self.groups
        outputs = [branch([views[size] for size in branch.tile_sizes], groups, max_views) for branch in self.branches]
        parts = []
        for per_branch in zip(*outputs, strict=True):
            batch_size, num_views = per_branch[0].shape[:2]
            tokens = self.mixer([branch_tokens.flatten(0, 1) for branch_tokens in per_branch])
            start, end = (token.expand(batch_size * num_views, -1, -1) for token in self.image_delimiters)
            tokens = torch.cat([start, tokens, end], dim=1)
            parts.append(rearrange(tokens, "(b v) n d -> b (v n) d", v=num_views))
        return torch.cat(parts, dim=1)
