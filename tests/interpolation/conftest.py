from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sphinxkit.tensor_source import MappingSource


def model(seed: int, dtype: torch.dtype = torch.float32, **shapes: tuple[int, ...]) -> MappingSource:
    """A small model with random tensors; shapes can be changed (``__`` stands for a dot) or set to () to leave out."""
    wanted: dict[str, tuple[int, ...]] = {
        "llm.embed_tokens.weight": (6, 4),
        "llm.layers.0.mlp.up_proj.weight": (5, 4),
        "llm.layers.1.mlp.up_proj.weight": (5, 4),
        "llm.layers.2.mlp.up_proj.weight": (5, 4),
        "vision.start_token": (1, 1, 4),
    }
    for name, shape in shapes.items():
        if shape:
            wanted[name.replace("__", ".")] = shape
        else:
            wanted.pop(name.replace("__", "."))
    generator = torch.Generator().manual_seed(seed)
    return MappingSource({name: torch.randn(shape, generator=generator).to(dtype) for name, shape in wanted.items()})


@pytest.fixture
def make_model() -> Callable[..., MappingSource]:
    return model
