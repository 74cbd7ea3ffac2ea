from __future__ import annotations

import dataclasses

import pytest
import torch

from sphinxkit.errors import ShapeError
from sphinxkit.features import VisionFeatures


def test_facts_and_token_order() -> None:
    prefix, patches = torch.randn(2, 1, 3), torch.randn(2, 6, 3)
    features = VisionFeatures(prefix, patches, (2, 3))
    assert (features.batch_size, features.embed_dim, features.num_tokens) == (2, 3, 7)
    assert torch.equal(features.tokens(), torch.cat([prefix, patches], dim=1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        features.grid = (3, 2)  # type: ignore[misc]


def test_queries_without_patches() -> None:
    features = VisionFeatures(torch.zeros(2, 32, 5), torch.zeros(2, 0, 5), (0, 0))
    assert features.num_tokens == 32
    assert features.tokens().shape == (2, 32, 5)


@pytest.mark.parametrize(
    ("prefix", "patches", "grid", "message"),
    [
        ((2, 3), (2, 6, 3), (2, 3), r"expected prefix \(B, P, D\) .* got \(2, 3\) and \(2, 6, 3\)"),
        ((2, 1, 3), (2, 6, 3), (2, 2), "6 patches do not fill the grid 2x2"),
        ((2, 1, 3), (2, 6, 3), (-2, -3), r"grid must be a pair .* at least 0, got \(-2, -3\)"),
        ((2, 1, 3), (2, 6, 3), 6, r"vision features: grid must be a pair \(H, W\) .* got 6"),
        ((2, 1, 4), (2, 6, 3), (2, 3), "differ in batch or width"),
        ((1, 1, 3), (2, 6, 3), (2, 3), "differ in batch or width"),
    ],
)
def test_refusals(prefix, patches, grid, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        VisionFeatures(torch.zeros(prefix), torch.zeros(patches), grid)
