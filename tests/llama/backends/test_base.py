from __future__ import annotations

import ctypes
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sphinxkit.errors import RegistryError
from sphinxkit.llama import AttentionPattern, KVCache, backends
from sphinxkit.llama.backends import xformers
from tests.llama.backends.oracle import (
    FP32_TOLERANCE,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    StandIn,
    cached_case,
    draw,
    fresh_case,
    make,
)

# 16-bit inputs are exact in the oracle; weights and the result are rounded to 8 bits: 2^-9 of values below 4, twice
BF16_TOLERANCE = 2e-2


FP16_TOLERANCE = 2.5e-3  # as above with 11 bits


# the gradients of 16-bit kernels pass through three more roundings and sums over the sequence
BF16_GRAD_TOLERANCE = 6e-2


CPU_BACKENDS = ["eager", "sdpa", "stand-in"]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_causal_and_packed_equal_the_float64_oracle(name: str, kv_heads: int) -> None:
    fresh_case(None, kv_heads=kv_heads).check(make(name), FP32_TOLERANCE)
    fresh_case(None, batch=1, width=1, kv_heads=kv_heads).check(make(name), FP32_TOLERANCE)
    fresh_case([3, 1, 5], kv_heads=kv_heads).check(make(name), FP32_TOLERANCE)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_cached_steps_equal_the_float64_oracle(name: str, kv_heads: int, static: bool) -> None:
    if name == "stand-in" and not static:
        pytest.skip("xformers reads caches with static shapes only")
    options = {"kv_heads": kv_heads, "static": static}
    backend = make(name)
    cached_case([0, 0], [1, 1], **options).check(backend, FP32_TOLERANCE)
    cached_case([4, 4], [1, 1], **options).check(backend, FP32_TOLERANCE)
    cached_case([4, 1, 9], [1, 1, 1], **options).check(backend, FP32_TOLERANCE)
    cached_case([4, 1, 9], [1, 1, 1], give_counts=False, **options).check(backend, FP32_TOLERANCE)
    cached_case([4, 13, 9], [1, 0, 1], **options).check(backend, FP32_TOLERANCE)
    cached_case([4, 4], [3, 3], **options).check(backend, FP32_TOLERANCE)
    cached_case([4, 1], [3, 3], give_counts=False, **options).check(backend, FP32_TOLERANCE)
    cached_case([4, 1, 2], [3, 5, 1], **options).check(backend, FP32_TOLERANCE)
    cached_case([12, 1, 13], [1, 9, 0], **options).check(backend, FP32_TOLERANCE)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_sixteen_bit_stays_close_to_the_oracle(name: str, dtype: torch.dtype, kv_heads: int) -> None:
    tolerance = BF16_TOLERANCE if dtype == torch.bfloat16 else FP16_TOLERANCE
    options = {"kv_heads": kv_heads, "dtype": dtype}
    fresh_case(None, **options).check(make(name), tolerance)
    fresh_case([2, 6], **options).check(make(name), tolerance)
    cached_case([4, 4], [1, 1], static=False, **options).check(make(name), tolerance)
    cached_case([4, 1, 9], [1, 1, 1], static=False, **options).check(make(name), tolerance)
    cached_case([4, 1, 9], [2, 3, 1], static=False, **options).check(make(name), tolerance)


def gradients(name: str, lens: list[int] | None, kv_heads: int) -> list[Tensor]:
    case = fresh_case(lens, kv_heads=kv_heads)
    leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    backend = make(name)
    out = backend.attend(*leaves, case.pattern, backend.prepare(case.pattern, torch.float32))
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    return list(torch.autograd.grad((out * weight).sum(), leaves))


@pytest.mark.parametrize("lens", [None, [3, 1, 5]])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_backward_passes_agree(lens: list[int] | None, kv_heads: int) -> None:
    expected = gradients("eager", lens, kv_heads)
    for name in ("sdpa", "stand-in"):
        torch.testing.assert_close(gradients(name, lens, kv_heads), expected, atol=FP32_TOLERANCE, rtol=0)


def test_unknown_backend_is_refused_with_a_suggestion() -> None:
    with pytest.raises(RegistryError, match="unknown attention backend 'sdqa'; did you mean 'sdpa'"):
        backends.registry.build("sdqa")


class TestProbe:
    @pytest.fixture(autouse=True)
    def no_memory(self) -> Iterator[None]:
        xformers._probe_xformers.cache_clear()
        yield
        xformers._probe_xformers.cache_clear()

    def probe(self, monkeypatch: pytest.MonkeyPatch, fmha: Any) -> str | None:
        loaded = xformers._XFormers(fmha, ("set the flag",))
        monkeypatch.setattr(xformers, "_load_xformers", lambda: loaded)
        return xformers._probe_xformers(torch.device("cpu"), torch.float32, 16)

    def test_right_numbers_pass(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fmha = StandIn()
        assert self.probe(monkeypatch, fmha) is None
        assert [len(shape) for shape in fmha.shapes] == [4, 5]  # causal, and over padded keys

    def test_wrong_numbers_do_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fmha = StandIn()
        fmha.memory_efficient_attention = lambda q, k, v, **_: torch.zeros_like(q)
        fault = self.probe(monkeypatch, fmha)
        assert fault is not None
        assert "gave wrong numbers" in fault
        assert "set the flag" in fault

    def test_not_a_number_does_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fmha = StandIn()
        fmha.memory_efficient_attention = lambda q, k, v, **_: torch.full_like(q, torch.nan)
        assert "gave wrong numbers" in str(self.probe(monkeypatch, fmha))

    def test_an_operator_that_refuses_is_quoted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: Any, **__: Any) -> Tensor:
            raise NotImplementedError("No operator found\n")

        fmha = StandIn()
        fmha.memory_efficient_attention = refuse
        fault = self.probe(monkeypatch, fmha)
        assert fault == "a probing call failed (set the flag): No operator found"

    def test_a_missing_package_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing() -> None:
            raise ModuleNotFoundError("No module named 'xformers'")

        monkeypatch.setattr(xformers, "_load_xformers", missing)
        fault = xformers._probe_xformers(torch.device("cpu"), torch.float32, 16)
        assert fault == "importing xformers failed: No module named 'xformers'"


class TestWorkAround:
    """Loading xformers beside a torch of another CUDA version."""

    @pytest.fixture
    def common(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        pytest.importorskip("xformers")
        logging.getLogger("xformers").setLevel(logging.ERROR)
        common = pytest.importorskip("xformers.ops.fmha.common")
        logging.getLogger("xformers").setLevel(logging.WARNING)
        monkeypatch.setattr(torch.version, "cuda", "13.2")
        monkeypatch.setattr(common, "_built_with_cuda", False)
        return common

    def test_the_flag_is_set_where_the_extension_did_not_load(
        self, common: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(xformers, "_cuda_runtime_12", lambda: None)
        loaded = xformers._load_xformers.__wrapped__()
        assert common._built_with_cuda is True
        assert loaded.fmha.common is common
        assert loaded.tried == (
            "no nvidia-cuda-runtime-cu12 installed to load libcudart.so.12 from",
            "imported xformers.ops.fmha",
            "its extension did not load, so its CUDA flag was set by hand",
        )
        assert logging.getLogger("xformers").level == logging.WARNING

    def test_nothing_is_touched_where_it_did_load(self, common: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        monkeypatch.setattr(common, "_built_with_cuda", True)
        assert xformers._load_xformers.__wrapped__().tried == ("imported xformers.ops.fmha",)

    def test_the_runtime_is_loaded_before_xformers_for_everyone_to_see(
        self, common: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[tuple[str, int]] = []
        monkeypatch.setattr(xformers, "_cuda_runtime_12", lambda: Path("/somewhere/libcudart.so.12"))
        monkeypatch.setattr(ctypes, "CDLL", lambda path, mode: calls.append((path, mode)))
        assert xformers._load_xformers.__wrapped__().tried[0] == "loaded libcudart.so.12 before xformers"
        assert calls == [("/somewhere/libcudart.so.12", ctypes.RTLD_GLOBAL)]

    def test_a_runtime_that_does_not_load_is_reported(
        self, common: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        broken = tmp_path / "libcudart.so.12"
        broken.write_text("not a library")
        monkeypatch.setattr(xformers, "_cuda_runtime_12", lambda: broken)
        assert xformers._load_xformers.__wrapped__().tried[0].startswith(f"loading {broken} failed: ")

    def test_the_runtime_is_looked_for_in_its_package(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        library = tmp_path / "lib" / "libcudart.so.12"
        spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "nvidia.cuda_runtime" else None)
        assert xformers._cuda_runtime_12() is None
        library.parent.mkdir()
        library.write_text("")
        assert xformers._cuda_runtime_12() == library
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        assert xformers._cuda_runtime_12() is None

        def no_parent(_: str) -> None:
            raise ModuleNotFoundError("No module named 'nvidia'")

        monkeypatch.setattr(importlib.util, "find_spec", no_parent)
        assert xformers._cuda_runtime_12() is None


@pytest.mark.gpu
class TestCUDA:
    """The three backends in 16 bit on a GPU against the float64 oracle and one another."""

    def test_xformers_works_here(self) -> None:
        for dtype in (torch.bfloat16, torch.float16):
            for head_dim in (16, 64, 128):
                assert backends.xformers_fault(torch.device("cuda"), dtype, head_dim) is None
        assert backends.registry.build("auto").resolve(torch.device("cuda"), torch.bfloat16, 64).name == "xformers"

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("kv_heads", [1, 2, 4])
    @pytest.mark.parametrize("name", ["xformers", "sdpa", "eager"])
    def test_forward_equals_the_oracle(self, name: str, kv_heads: int, dtype: torch.dtype) -> None:
        tolerance = BF16_TOLERANCE if dtype == torch.bfloat16 else FP16_TOLERANCE
        options = {"kv_heads": kv_heads, "dtype": dtype, "device": "cuda"}
        backend = make(name).resolve(torch.device("cuda"), dtype, HEAD_DIM)
        with torch.no_grad():
            fresh_case(None, **options).check(backend, tolerance)
            fresh_case([3, 1, 5], **options).check(backend, tolerance)
            cached_case([4, 4], [1, 1], **options).check(backend, tolerance)
            cached_case([4, 1, 9], [1, 1, 1], give_counts=False, **options).check(backend, tolerance)
            cached_case([4, 13, 9], [1, 0, 1], **options).check(backend, tolerance)
            cached_case([4, 1], [3, 3], give_counts=False, **options).check(backend, tolerance)
            cached_case([4, 1, 2], [3, 5, 1], **options).check(backend, tolerance)
            cached_case([12, 1, 13], [1, 9, 0], **options).check(backend, tolerance)
            cached_case([300, 7], [1, 1], capacity=600, **options).check(backend, tolerance)

    @pytest.mark.parametrize("lens", [None, [3, 1, 5]])
    @pytest.mark.parametrize("kv_heads", [2, 4])
    def test_backward_passes_agree(self, lens: list[int] | None, kv_heads: int) -> None:
        found: dict[str, list[Tensor]] = {}
        for name in ("eager", "sdpa", "xformers"):
            case = fresh_case(lens, kv_heads=kv_heads, dtype=torch.bfloat16, device="cuda")
            leaves = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]
            backend = make(name).resolve(torch.device("cuda"), torch.bfloat16, HEAD_DIM)
            out = backend.attend(*leaves, case.pattern, backend.prepare(case.pattern, torch.bfloat16))
            weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
            found[name] = list(torch.autograd.grad((out * weight).sum(), leaves))
        for name in ("sdpa", "xformers"):
            torch.testing.assert_close(found[name], found["eager"], atol=BF16_GRAD_TOLERANCE, rtol=0)

    def test_a_static_decoding_step_does_not_wait_for_the_device(self) -> None:
        backend = make("xformers").resolve(torch.device("cuda"), torch.bfloat16, HEAD_DIM)
        cached_case([4, 1], [1, 1], dtype=torch.bfloat16, device="cuda").check(backend, BF16_TOLERANCE)  # warm
        cache = KVCache(1, 2, 13, KV_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        cache.advance(cache.prepare_write(3))
        q = draw(2, 1, HEADS, seed=0, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step = cache.prepare_write(1)
            pattern = AttentionPattern(2, 1, q.device, write=step)
            backend.attend(q, *cache.read(0, step), pattern, backend.prepare(pattern, torch.bfloat16))
            cache.advance(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
