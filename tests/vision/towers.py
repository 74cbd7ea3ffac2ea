from __future__ import annotations

import torch
from torch import Tensor, nn

from sphinxkit.features import VisionFeatures
from sphinxkit.mixers import SequenceMixer
from sphinxkit.tilers import GridTiler
from sphinxkit.vision import VisionBranch, VisionTower


class CountingEncoder(nn.Module):
    """Tokens that tell which view they come from: the view's mean, plus the place in the grid."""

    embed_dim, num_prefix_tokens, grid_size = 1, 1, (2, 2)

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def forward(self, pixels: Tensor) -> VisionFeatures:
        self.seen.append(tuple(pixels.shape))
        mean = pixels.mean((1, 2, 3))[:, None, None]
        return VisionFeatures(mean + 0.5, mean + torch.arange(4.0)[None, :, None] / 10, (2, 2))


def tower(tiler: GridTiler, *branches: VisionBranch) -> VisionTower:
    built = VisionTower(branches, SequenceMixer(), embed_dim=1, image_size=tiler.image_size[0], tiler=tiler)
    nn.init.constant_(built.start_token, -1.0)
    nn.init.constant_(built.end_token, -2.0)
    return built


def blocks(batch: int) -> Tensor:
    """Images of 2x2 blocks of 4 pixels, whose values are 10 * image + 1, 2, 3, 4 row by row."""
    block = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat_interleave(4, 0).repeat_interleave(4, 1)
    return (block + 10 * torch.arange(batch).view(-1, 1, 1, 1)).expand(batch, 3, 8, 8)
