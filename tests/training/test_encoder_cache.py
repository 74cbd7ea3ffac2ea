from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sphinxkit import encoders
from sphinxkit.encoders.base import Encoder, EncoderInfo
from sphinxkit.training.encoder_cache import FeatureCache, network_digest


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
    [path] = first.folder.rglob("*.safetensors")
    path.write_bytes(b"half")
    again = FeatureCache(make(), tmp_path)
    assert torch.equal(again(views).patches, expected)
    assert again.misses == 1


def test_whatever_decides_what_is_computed_is_another_network() -> None:
    base = network_digest(make())
    assert network_digest(make()) == base
    options: list[dict[str, Any]] = [{"activation": "gelu"}, {"norm_eps": 1e-3}, {"image_size": 14}, {"num_heads": 4}]
    others = [network_digest(make(**option)) for option in options]
    with_buffer = make()
    with_buffer.register_buffer("scale", torch.ones(1), persistent=False)
    others.append(network_digest(with_buffer))
    with_other_buffer = make()
    with_other_buffer.register_buffer("scale", torch.zeros(1), persistent=False)
    others += [network_digest(with_other_buffer), network_digest(make().double())]
    assert len({base, *others}) == 1 + len(others)


def test_settings_of_any_kind_are_told_apart() -> None:
    def scaled(factor: float) -> Callable[[float], float]:
        return lambda value: factor * value

    class Custom(nn.Module):
        def __init__(self, setting: Any) -> None:
            super().__init__()
            self.setting = setting

    settings = [1, 1.5, "a", None, (1, 2), [2, 1], {"a": 1}, {3, 4}, torch.nn.functional.gelu, torch.nn.functional.silu]
    settings += [scaled(1.0), scaled(2.0), partial(scaled, 1.0), partial(scaled, 2.0), EncoderInfo(), nn.ReLU, object()]
    settings += [EncoderInfo(input_size=448), EncoderInfo().__eq__, torch.float32, lambda value=1: value]
    digests = [network_digest(Custom(setting)) for setting in settings]
    assert len(set(digests)) == len(digests)
    assert digests == [network_digest(Custom(setting)) for setting in settings]


def test_the_second_run_does_not_read_the_first_ones_features(tmp_path: Path) -> None:
    views = torch.randn(2, 3, 28, 28)
    for activation in ("quick_gelu", "gelu"):
        encoder = make(activation=activation)
        expected = encoder(views).patches
        cache = FeatureCache(encoder, tmp_path)
        assert torch.allclose(cache(views).patches, expected, atol=1e-6)
        assert cache.misses == 2
