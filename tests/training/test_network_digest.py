from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from sphinxkit import encoders
from sphinxkit.encoders.base import Encoder, EncoderInfo
from sphinxkit.training.network_digest import network_digest, tensor_digest


def make(**options: Any) -> Encoder:
    torch.manual_seed(0)
    sizes = {"image_size": 28, "embed_dim": 8, "num_layers": 1, "num_heads": 2}
    return encoders.create("clip_vit_large_patch14", **sizes | options)


def test_tensors_differ_by_shape_dtype_and_values() -> None:
    tensors = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), torch.tensor([0.0, 0, 0, 1])]
    assert len({tensor_digest(tensor) for tensor in tensors}) == 4
    assert tensor_digest(torch.arange(6).reshape(2, 3).T) == tensor_digest(torch.tensor([[0, 3], [1, 4], [2, 5]]))


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
