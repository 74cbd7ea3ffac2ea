from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sphinxkit.errors import RegistryError
from sphinxkit.llama import backends
from sphinxkit.llama.backends import xformers
from tests.llama.backends.oracle import (
    FP32_TOLERANCE,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    cached_case,
    fresh_case,
    make,
)


def test_xformers_sees_the_cache_without_a_copy() -> None:
    case = cached_case([4, 1], [1, 1])
    backend = make("stand-in")
    seen: list[int] = []
    inner = backend._fmha.memory_efficient_attention

    def watch(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.extend((k.data_ptr(), v.data_ptr(), k.stride(3)))
        return inner(q, k, v, **options)

    backend._fmha.memory_efficient_attention = watch
    case.check(backend, FP32_TOLERANCE)
    assert seen == [case.k.data_ptr(), case.v.data_ptr(), 0]
    assert backend._fmha.shapes == [(1, 2 * 16, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)]


def test_a_named_xformers_says_why_it_cannot_run() -> None:
    backend = backends.registry.build("xformers")
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    with pytest.raises(RegistryError, match=r"'xformers' cannot run on cpu in torch.bfloat16: .* CUDA only"):
        backend.resolve(cpu, torch.bfloat16, 64)
    with pytest.raises(RegistryError, match=r"cannot run on cuda:0 in torch.float32: it takes float16 and bfloat16"):
        backend.resolve(cuda, torch.float32, 64)
    with pytest.raises(RegistryError, match=r"multiples of 8 up to 256, got 36"):
        backend.resolve(cuda, torch.bfloat16, 36)


def test_auto_takes_xformers_where_a_probe_works_and_sdpa_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = backends.registry.build("auto")
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert auto.resolve(cpu, torch.bfloat16, 64).name == "sdpa"
    monkeypatch.setattr(xformers, "_probe_xformers", lambda *_: None)
    assert auto.resolve(cuda, torch.bfloat16, 64).name == "xformers"
    assert auto.resolve(cuda, torch.float32, 64).name == "sdpa"
    monkeypatch.setattr(xformers, "_probe_xformers", lambda *_: "it is broken")
    assert auto.resolve(cuda, torch.bfloat16, 64).name == "sdpa"
    with pytest.raises(RegistryError, match="it is broken"):
        backends.registry.build("xformers").resolve(cuda, torch.bfloat16, 64)


def test_auto_attends_by_itself() -> None:
    fresh_case(None).check(make("auto"), FP32_TOLERANCE)
