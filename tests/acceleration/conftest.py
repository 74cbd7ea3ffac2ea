from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sphinxkit.acceleration import FusedAccelerator
from sphinxkit.llama import KVCache, LlamaBlock, LlamaModel


@pytest.fixture
def ready_llama(small_llama: Callable[..., LlamaModel]) -> Callable[..., LlamaModel]:
    """Builds a small model that is ready for inference; ``accelerator`` is set if given."""

    def build(accelerator: FusedAccelerator | None = None, **options: object) -> LlamaModel:
        model = small_llama(**options).requires_grad_(False).eval()
        model.accelerator = accelerator
        return model

    return build


@pytest.fixture
def module_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets the layer's number whenever a layer runs as a module."""
    found: list[int] = []
    plain = LlamaBlock.forward

    def counted(self: LlamaBlock, x: Tensor, context: Any, layer: int) -> Tensor:
        found.append(layer)
        return plain(self, x, context, layer)

    monkeypatch.setattr(LlamaBlock, "forward", counted)
    return found


def embeds_of(batch: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, width, 32, generator=torch.Generator().manual_seed(seed))


def logits_of(model: LlamaModel, embeds: Tensor, *widths: int, cache: KVCache | None = None) -> Tensor:
    """Logits of every position, read in pieces of the given widths."""
    cache = model.make_cache(len(embeds)) if cache is None else cache
    pieces = torch.split(embeds, list(widths) or [embeds.shape[1]], 1)
    return torch.cat([model.prefill(piece, cache, all_positions=True) for piece in pieces], 1)
