from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sphinxkit import encoders
from sphinxkit.encoders.base import Encoder
from sphinxkit.training.encoder_cache import FeatureCache


def make(seed: int = 0, **options: Any) -> Encoder:
    torch.manual_seed(seed)
    sizes = {"image_size": 28, "embed_dim": 8, "num_layers": 1, "num_heads": 2}
    return encoders.create("clip_vit_large_patch14", **sizes | options)


def test_features_are_computed_once_and_equal(tmp_path: Path) -> None:
    encoder = make()
    views = torch.randn(3, 3, 28, 28)
    expected = [encoder(view[None]) for view in views]
    cache = FeatureCache(encoder, tmp_path)
    for start, hits, misses in ((0, 0, 2), (1, 1, 3), (0, 3, 3)):  # views 0 1, then 1 2, then 0 1
        found = cache(views[start : start + 2])
        assert (cache.hits, cache.misses) == (hits, misses)
        for row in range(2):
            assert torch.allclose(found.prefix[row], expected[start + row].prefix[0], atol=1e-6)
            assert torch.allclose(found.patches[row], expected[start + row].patches[0], atol=1e-6)
        assert found.grid == encoder.grid_size
    assert FeatureCache(encoder, tmp_path)(views).grid == encoder.grid_size


def test_other_weights_are_other_files_and_damage_is_repaired(tmp_path: Path) -> None:
    views = torch.randn(1, 3, 28, 28)
    first = FeatureCache(make(), tmp_path)
    expected = first(views).patches
    other = FeatureCache(make(1), tmp_path)
    assert not torch.equal(other(views).patches, expected)
    assert other.misses == 1
    [path] = first.shards.folder.glob("*.data")
    path.write_bytes(path.read_bytes()[:-1])
    again = FeatureCache(make(), tmp_path)
    assert torch.equal(again(views).patches, expected)
    assert again.misses == 1


def test_the_second_run_does_not_read_the_first_ones_features(tmp_path: Path) -> None:
    views = torch.randn(2, 3, 28, 28)
    for activation in ("quick_gelu", "gelu"):
        encoder = make(activation=activation)
        expected = encoder(views).patches
        cache = FeatureCache(encoder, tmp_path)
        assert torch.allclose(cache(views).patches, expected, atol=1e-6)
        assert cache.misses == 2


def test_autocast_has_features_of_its_own(tmp_path: Path) -> None:
    encoder, views = make(), torch.randn(1, 3, 28, 28)
    expected = encoder(views).patches
    with torch.autocast("cpu", torch.bfloat16):
        rounded = FeatureCache(encoder, tmp_path)(views).patches
    cache = FeatureCache(make(), tmp_path)
    assert torch.equal(cache(views).patches, expected)
    assert cache.misses == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cache(views).patches, rounded)
    assert cache.hits == 1
