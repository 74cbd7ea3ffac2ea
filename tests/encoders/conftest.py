from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sphinxkit import encoders
from tests.encoders.stand_ins import NAME, TINY, open_clip_state


@pytest.fixture
def randomize() -> Callable[..., nn.Module]:
    """Fill every parameter with random values, none left at 0 or 1, of a size that keeps activations of order one."""

    def fill(module: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim == 1 and not name.endswith("bias"):  # norm weights, layer scales, class token
                    parameter.copy_(1.0 + 0.3 * noise)
                elif parameter.ndim == 1:
                    parameter.copy_(0.2 * noise)
                elif name.endswith("weight"):
                    parameter.copy_(noise * parameter[0].numel() ** -0.5)
                else:  # positions, tokens
                    parameter.copy_(noise)
        return module

    return fill


@pytest.fixture
def random_pixels() -> Callable[..., Tensor]:
    """CLIP-normalised-looking pixels (batch, 3, side, side)."""

    def make(batch: int, side: int, seed: int = 0) -> Tensor:
        return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture
def source(tmp_path: Path, randomize: Callable[..., nn.Module]) -> Path:
    """A file of CLIP in open_clip's format."""
    path = tmp_path / "clip.pth"
    torch.save(open_clip_state(randomize(encoders.create(NAME, **TINY), seed=5)), path)
    return path
