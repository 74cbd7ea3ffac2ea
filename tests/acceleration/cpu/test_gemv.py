"""The CPU's GEMV kernel: against float64 and torch's operators, and in an accelerated model."""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphinxkit.acceleration import CompiledAccelerator, FusedAccelerator, fused, quantize
from sphinxkit.acceleration.cpu import attention, gemv
from sphinxkit.acceleration.cpu.gemv import DTYPES, FLAGS, MAX_ROWS, Gemv
from sphinxkit.acceleration.cpu.probe import find_gemv
from sphinxkit.acceleration.ops import FusedOps
from sphinxkit.acceleration.quantization import quantize_rows
from sphinxkit.errors import ShapeError
from sphinxkit.llama import LlamaModel
from tests.acceleration.conftest import logits_of

pytestmark = pytest.mark.skipif(gemv.find_compiler() is None, reason="there is no C compiler")

Builder = Callable[..., LlamaModel]
# of 1 + the right number: bfloat16 rounds to 2^-9 of each number, some twice or before a product; float32 to 2^-24, and
# sums of 300 products a little more
TOLERANCE = {torch.bfloat16: 0.03, torch.float32: 5e-6}
LOGITS_TOLERANCE = 1e-5  # see test_fused.py
TARGETS: list[Any] = ["native"]
if platform.machine() == "x86_64":
    TARGETS.append("x86-64")  # without AVX: registers of 128 bits
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        TARGETS.append(pytest.param("x86-64-v3", marks=pytest.mark.slow))
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        TARGETS.append(pytest.param("x86-64-v4", marks=pytest.mark.slow))  # without the instruction for bfloat16


@cache
def build(dtype: torch.dtype, target: str = "native", coded: bool = False) -> Gemv:
    return Gemv(dtype, flags=[flag.replace("native", target) for flag in FLAGS], coded=coded)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(x: Tensor, weight: Tensor, ops: FusedOps) -> Tensor:
    """In float64, rounded nowhere."""
    wide = x.double()
    if ops.norm is not None:
        wide = F.rms_norm(wide, wide.shape[-1:], ops.norm.double(), ops.eps)
    out = wide @ weight.double().T
    if ops.gated:
        gate, up = out.chunk(2, -1)
        out = F.silu(gate) * up
    return out


def all_ops(norm: Tensor) -> tuple[FusedOps, ...]:
    return (
        FusedOps(),
        FusedOps(norm, 1e-5),
        FusedOps(gated=True),
        FusedOps(norm, 1e-5, gated=True),
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "width"), [(22, 64), (6, 300), (2, 7), (130, 33)])
def test_products_are_right(dtype: torch.dtype, target: str, outputs: int, width: int) -> None:
    kernel = build(dtype, target)
    weight = (randn(outputs, width) / width**0.5).to(dtype)
    norm = randn(width, dtype=dtype, seed=1)
    for rows in range(1, MAX_ROWS + 1):
        x = 3 * randn(rows, width, dtype=dtype, seed=2)
        for ops in all_ops(norm):
            got = kernel(x, weight, ops)
            expected = exact(x, weight, ops)
            assert got.dtype == dtype
            assert got.shape == expected.shape
            distance = float(((got.double() - expected).abs() / (1 + expected.abs())).max())
            assert distance < TOLERANCE[dtype], (rows, ops)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 8, 9, 31])
def test_large_matrices_are_right(dtype: torch.dtype, rows: int, two_threads: None) -> None:
    """Several chunks for each of two threads."""
    weight, norm = (randn(2066, 515) / 515**0.5).to(dtype), randn(515, dtype=dtype, seed=1)
    x = 3 * randn(rows, 515, dtype=dtype, seed=2)
    for ops in (FusedOps(), FusedOps(norm, 1e-5, gated=True)):
        expected = exact(x, weight, ops)
        got = build(dtype)(x, weight, ops).double()
        assert float(((got - expected).abs() / (1 + expected.abs())).max()) < TOLERANCE[dtype]


@pytest.mark.slow
def test_large_matrices_of_codes_are_right(two_threads: None) -> None:
    codes, scales, weight = codes_of(randn(2066, 515) / 515**0.5, torch.float32)
    for rows in (8, 9, 31):
        x = 3 * randn(rows, 515)
        got = build(torch.float32, coded=True)(x, codes, scales=scales)
        torch.testing.assert_close(got.double(), exact(x, weight, FusedOps()), atol=2e-3, rtol=0)


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def codes_of(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales, and what they stand for in float64."""
    codes, scales = quantize_rows(weight.to(dtype))
    return codes, scales, codes.double() * scales.double()[:, None]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "width"), [(22, 64), (6, 2081), (2, 7), (514, 600)])
def test_products_with_codes_are_right(dtype: torch.dtype, target: str, outputs: int, width: int) -> None:
    kernel = build(dtype, target, coded=True)
    codes, scales, weight = codes_of(randn(outputs, width) / width**0.5, dtype)
    norm = randn(width, dtype=dtype, seed=1)
    for rows in (1, 2, 3, 6, 8, 13, 32):
        x = 3 * randn(rows, width, dtype=dtype, seed=2)
        x[0, width // 2] = 300  # beside it the others are rounded to a hundredth
        for ops in all_ops(norm):
            got = kernel(x, codes, ops, scales).double()
            expected = exact(x, weight, ops)
            given = x.double() if ops.norm is None else exact(x, torch.eye(width), FusedOps(norm, 1e-5))
            # half a step of x, or all of it in a norm that rounds itself
            step = torch.cat([part.abs().amax(1, True) for part in given.split(2048, 1)], 1) / 32767
            rounding = sum(
                at[:, None] * part.abs().sum(1) for at, part in zip(step.unbind(1), weight.split(2048, 1), strict=True)
            )
            if ops.gated:
                gate, up = ((given @ weight.T).abs() + rounding).chunk(2, -1)
                gate_error, up_error = rounding.chunk(2, -1)
                rounding = 1.1 * gate_error * up + gate * up_error  # silu's slope is at most 1.1
            assert bool(((got - expected).abs() <= rounding + TOLERANCE[dtype] * (1 + expected.abs())).all()), (
                rows,
                ops,
            )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_of_codes(target: str, sign: int) -> None:
    codes = torch.full((4, 5000), -128, dtype=torch.int8)
    got = build(torch.float32, target, coded=True)(torch.full((3, 5000), 0.5 * sign), codes, scales=torch.ones(4))
    torch.testing.assert_close(got, torch.full((3, 4), -64 * 5000.0 * sign))


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_leave_what_is_not_a_number_so(dtype: torch.dtype) -> None:
    codes, scales, _ = codes_of(randn(5, 70), dtype)
    x = randn(5, 70, dtype=dtype)
    x[1, 66], x[2, 3], x[3] = float("nan"), float("inf"), 0
    x[4] *= 1e-37
    got = build(dtype, coded=True)(x, codes, scales=scales)
    assert bool(got[0].isfinite().all())
    assert not bool(got[1:3].isfinite().any())
    assert bool((got[3] == 0).all())
    assert bool((got[4].abs() < 1e-35).all())


@pytest.mark.parametrize("rows", [1, 3, 8, 21])
def test_bfloat16_rounds_where_operators_round(rows: int) -> None:
    """Small whole numbers: every sum is exact in any order."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randint(-3, 4, (rows, 96), generator=generator).bfloat16()
    weight = torch.randint(-3, 4, (64, 96), generator=generator).bfloat16() / 16
    kernel = build(torch.bfloat16)
    assert torch.equal(kernel(x, weight), fused._multiply(x, weight, FusedOps()))
    # an exponential or a root may be another in its last bit, so a rounding after it, too
    norm = FusedOps(randn(96, dtype=torch.bfloat16, seed=1), 1e-5)
    for matrix, ops in ((weight, FusedOps(gated=True)), (torch.eye(96, dtype=torch.bfloat16), norm)):
        got, expected = kernel(x, matrix, ops), fused._multiply(x, matrix, ops)
        assert float((got == expected).float().mean()) > 0.97
        torch.testing.assert_close(got, expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_stays_so(dtype: torch.dtype) -> None:
    weight = randn(5, 70, dtype=dtype)
    x = randn(3, 70, dtype=dtype)
    x[1, 66], x[2, 3] = float("nan"), float("inf")
    got = build(dtype)(x, weight)
    assert bool(got[0].isfinite().all())
    assert bool(got[1].isnan().all())
    assert bool(got[2].isinf().all())


@pytest.mark.slow
@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 12])
def test_threads_do_not_change_a_number(dtype: torch.dtype, rows: int, coded: bool) -> None:
    weight, x = randn(137, 5003, dtype=dtype), randn(rows, 5003, dtype=dtype)
    given, scales = codes_of(weight.float(), dtype)[:2] if coded else (weight, None)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5, 50):
            torch.set_num_threads(count)
            results.append(build(dtype, coded=coded)(x, given, scales=scales))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_shapes_and_strides_of_x() -> None:
    weight, x = randn(9, 20), randn(20, 2, 3)
    got = build(torch.float32)(x.permute(1, 2, 0), weight)
    torch.testing.assert_close(got, F.linear(x.permute(1, 2, 0), weight))


def test_bad_input_is_refused() -> None:
    kernel = build(torch.float32)
    for x, weight in [
        (randn(33, 20), randn(4, 20)),
        (randn(0, 20), randn(4, 20)),
        (randn(1, 40), randn(4, 20)),
        (randn(1, 20), randn(20, 4).T),
    ]:
        with pytest.raises(ShapeError, match=r"expected 1 to 32 rows of 20"):
            kernel(x, weight)
    with pytest.raises(ShapeError, match=r"a norm of 20 numbers, got \(1, 20\)"):
        kernel(randn(1, 20), randn(4, 20), FusedOps(randn(1, 20)))
    with pytest.raises(ShapeError, match=r"even number of outputs, got 5"):
        kernel(randn(1, 20), randn(5, 20), FusedOps(gated=True))
    with pytest.raises(TypeError, match=r"got torch.float64 on cpu"):
        kernel(randn(1, 20), randn(4, 20), FusedOps(randn(20).double()))
    for x, weight in [
        (randn(1, 20).double(), randn(4, 20)),
        (randn(1, 20), randn(4, 20).bfloat16()),
        (randn(1, 20).to("meta"), randn(4, 20)),
    ]:
        with pytest.raises(TypeError, match=r"expected torch.float32 on the CPU"):
            kernel(x, weight)
    with pytest.raises(TypeError, match=r"asked for torch.float16"):
        Gemv(torch.float16)


def test_bad_codes_are_refused() -> None:
    kernel, codes = build(torch.float32, coded=True), torch.ones(4, 20, dtype=torch.int8)
    with pytest.raises(ShapeError, match=r"expected 4 scales, got None"):
        kernel(randn(1, 20), codes)
    with pytest.raises(ShapeError, match=r"expected 4 scales, got \(5,\)"):
        kernel(randn(1, 20), codes, scales=randn(5))
    with pytest.raises(ShapeError, match=r"expected no scales, got \(4,\)"):
        build(torch.float32)(randn(1, 20), randn(4, 20), scales=randn(4))
    with pytest.raises(TypeError, match=r"expected torch.int8 on the CPU, got torch.float32"):
        kernel(randn(1, 20), randn(4, 20), scales=randn(4))
    with pytest.raises(TypeError, match=r"expected torch.float32 on the CPU, got torch.bfloat16"):
        kernel(randn(1, 20), codes, scales=randn(4).bfloat16())


class TestChoice:
    """``find_gemv``, without its memory."""

    find = staticmethod(find_gemv.__wrapped__)

    @pytest.mark.parametrize("coded", [False, pytest.param(True, marks=pytest.mark.slow)])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_it_is_found(self, dtype: torch.dtype, coded: bool, caplog: pytest.LogCaptureFixture) -> None:
        found = self.find(dtype, coded)
        assert isinstance(found, Gemv)
        assert found.coded == coded
        assert not caplog.records

    def test_no_compiler_is_no_news(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        monkeypatch.setenv("PATH", "")
        assert self.find(torch.float32, coded=False) is None
        assert not caplog.records

    @pytest.mark.parametrize("command", ["", "no-such-compiler -m64"])
    def test_gcc_stands_in_for_no_compiler(self, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
        monkeypatch.setenv("CC", command)
        assert gemv.find_compiler() == ["gcc"]

    @pytest.mark.parametrize(
        ("command", "words"),
        [("false", "false failed"), ("true", "gemv.so"), ('gcc "', "No closing quotation")],
    )
    def test_a_broken_compiler_is(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, command: str, words: str
    ) -> None:
        monkeypatch.setenv("CC", command)
        assert self.find(torch.float32, coded=False) is None
        assert words in caplog.text

    def test_a_compiler_that_hangs_is(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        monkeypatch.setenv("CC", "sh -c 'exec sleep 60'")
        monkeypatch.setattr(gemv, "_TIMEOUT_S", 0.2)
        assert self.find(torch.float32, coded=False) is None
        assert "sh took longer than 0.2 s" in caplog.text

    @pytest.mark.slow
    def test_a_library_without_the_kernel_is(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("CC", "gcc -Dgemv=another")
        assert self.find(torch.float32, coded=False) is None
        assert "AttributeError" in caplog.text

    @pytest.mark.parametrize("coded", [False, pytest.param(True, marks=pytest.mark.slow)])
    def test_wrong_numbers_are(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, coded: bool
    ) -> None:
        right = Gemv.__call__

        def wrong(self: Gemv, x: Tensor, *operands: Any) -> Tensor:
            out = right(self, x, *operands)
            return out * 1.01 if len(x) == 7 else out

        monkeypatch.setattr(Gemv, "__call__", wrong)
        assert self.find(torch.float32, coded) is None
        assert "wrong numbers: 7 rows, gated" in caplog.text
        assert "6 rows" not in caplog.text


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Accelerated models use the kernel whatever their size; the shapes of the matrices that it multiplies with."""
    found: list[tuple[int, ...]] = []
    right = Gemv.__call__

    def counted(self: Gemv, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        found.append(tuple(weight.shape))
        return right(self, x, weight, *rest)

    monkeypatch.setattr(fused, "COMPILE_BYTES", 0)
    for dtype in DTYPES:
        for coded in (False, True):
            find_gemv(dtype, coded)  # its probe is not counted
    monkeypatch.setattr(Gemv, "__call__", counted)
    return found


@pytest.mark.parametrize("num_kv_heads", [1, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_an_accelerated_model_gives_the_same_logits(
    ready_llama: Builder, calls: list[tuple[int, ...]], num_kv_heads: int, batch: int
) -> None:
    model = ready_llama(num_kv_heads=num_kv_heads)
    embeds, widths = randn(batch, 45, 32), (33, 1, 9, 1, 1)
    expected = logits_of(model, embeds, *widths)
    assert not calls
    model.accelerator = FusedAccelerator()
    torch.testing.assert_close(logits_of(model, embeds, *widths), expected, atol=LOGITS_TOLERANCE, rtol=0)
    # four products of each of two layers and the output matrix, in every step of at most 32 rows
    assert len(calls) == 4 * (4 * 2 + 1)
    model.accelerator = FusedAccelerator(use_gemv=False)
    calls.clear()
    torch.testing.assert_close(logits_of(model, embeds, *widths), expected, atol=LOGITS_TOLERANCE, rtol=0)
    assert not calls


def test_a_bfloat16_model_is_as_exact_as_without(ready_llama: Builder, calls: list[tuple[int, ...]]) -> None:
    half = ready_llama().to(torch.bfloat16)
    embeds, widths = randn(2, 12, 32, dtype=torch.bfloat16), (8, 1, 1, 1, 1)
    expected = logits_of(copy.deepcopy(half).float(), embeds.float(), *widths)
    distances = []
    for use in (True, False):
        half.accelerator = FusedAccelerator(use_gemv=use)
        distances.append(float((logits_of(half, embeds, *widths).float() - expected).square().mean().sqrt()))
    assert calls
    assert distances[0] < 1.2 * distances[1]


def test_an_output_matrix_of_eight_bits_uses_it(ready_llama: Builder, calls: list[tuple[int, ...]]) -> None:
    model = ready_llama(hidden_dim=64, vocab_size=80)
    quantize(model, 8, lm_head=True)
    embeds = randn(1, 3, 32)
    expected = logits_of(model, embeds, 2, 1)
    model.accelerator = FusedAccelerator()
    torch.testing.assert_close(logits_of(model, embeds, 2, 1), expected, atol=1e-3, rtol=0)
    assert len(calls) == 2 * (4 * 2 + 1)
    assert calls.count((80, 32)) == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_of_eight_bits_use_it(ready_llama: Builder, calls: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    model = ready_llama(hidden_dim=64).to(dtype)
    embeds, widths = randn(2, 24, 32, dtype=dtype), (17, 5, 1, 1)
    quantize(model, 8)
    expected = logits_of(copy.deepcopy(model).float(), embeds.float(), *widths)
    distances = []
    for use in (False, True):
        model.accelerator = FusedAccelerator(use_gemv=use)
        assert not calls
        distances.append(float((logits_of(model, embeds, *widths).float() - expected).square().mean().sqrt()))
    assert len(calls) == 3 * (4 * 2 + 1)  # 34 rows are too many
    assert distances[1] < max(1.2 * distances[0], 1e-4)


def test_a_small_output_matrix_beside_codes_does_not_compile(
    ready_llama: Builder, calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ready_llama(FusedAccelerator(), hidden_dim=64)
    quantize(model, 8)
    monkeypatch.setattr(fused, "COMPILE_BYTES", sum(_nbytes(layer) for layer in model.layers))
    logits_of(model, randn(1, 3, 32), 2, 1)
    assert len(calls) == 2 * 4 * 2  # the layers are large enough


def _nbytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "lm_head", nn.Linear(32, 61)),
        lambda model: setattr(model, "lm_head", nn.Sequential(model.lm_head)),
        lambda model: setattr(model.lm_head.weight, "data", model.lm_head.weight.data.T.contiguous().T),
    ],
    ids=["bias", "wrapped", "transposed"],
)
def test_an_output_matrix_of_another_kind_is_called(
    ready_llama: Builder, calls: list[tuple[int, ...]], change: Callable[[LlamaModel], object]
) -> None:
    model = ready_llama()
    change(model)
    model.lm_head.requires_grad_(False)
    expected = logits_of(model, randn(1, 3, 32), 2, 1)
    model.accelerator = FusedAccelerator()
    torch.testing.assert_close(logits_of(model, randn(1, 3, 32), 2, 1), expected, atol=LOGITS_TOLERANCE, rtol=0)
    assert len(calls) == 2 * 4 * 2


@pytest.mark.slow
def test_traced_and_stand_in_tensors_are_left_to_torch(ready_llama: Builder, calls: list[tuple[int, ...]]) -> None:
    class StandIn(Tensor):
        pass

    model = ready_llama()
    expected = logits_of(model, randn(1, 3, 32), 2, 1)
    model.accelerator = FusedAccelerator()
    logits = logits_of(model, randn(1, 3, 32).as_subclass(StandIn), 2, 1)
    torch.testing.assert_close(logits.as_subclass(Tensor), expected, atol=LOGITS_TOLERANCE, rtol=0)
    model.accelerator = CompiledAccelerator("eager")
    made = model.make_cache(1)
    logits = model.prefill(randn(1, 3, 32), made)
    model.decode(torch.tensor([[3]]), made)
    torch.testing.assert_close(logits, expected[:, -1:], atol=LOGITS_TOLERANCE, rtol=0)
    assert not calls


def test_what_only_looks_like_numbers_is_left_to_torch(ready_llama: Builder, calls: list[tuple[int, ...]]) -> None:
    model = ready_llama(FusedAccelerator())
    with torch.autocast("cpu", torch.bfloat16):
        logits_of(model, randn(1, 3, 32), 2, 1)
    assert not calls
    wide = ready_llama(FusedAccelerator()).double()
    logits_of(wide, randn(1, 3, 32).double(), 2, 1)
    assert not calls


@pytest.mark.slow
def test_the_host_programs_defaults_change_nothing(
    ready_llama: Builder, calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "BLOCKED_LENGTHS", range(8, 64))
    monkeypatch.setattr(attention, "_has_no_tiles", lambda: True)
    monkeypatch.setattr(fused, "find_gemv", find_gemv.__wrapped__)
    half = ready_llama().to(torch.bfloat16)
    embeds, found = randn(1, 50, 32, dtype=torch.bfloat16), []
    for dtype, device in ((torch.float32, None), (torch.float64, "meta")):
        torch.set_default_dtype(dtype)
        torch.set_default_device(device)
        try:
            half.accelerator = FusedAccelerator()
            found.append(logits_of(half, embeds, 48, 1, 1))
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
    assert torch.equal(*found)
    assert calls


def test_small_models_do_not_compile(ready_llama: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dtype: torch.dtype, coded: bool) -> None:
        raise AssertionError(f"a kernel for {dtype} was looked for")

    monkeypatch.setattr(fused, "find_gemv", refuse)
    logits_of(ready_llama(FusedAccelerator()), randn(1, 3, 32), 2, 1)
    monkeypatch.setattr(fused, "COMPILE_BYTES", 0)
    with pytest.raises(AssertionError, match=r"torch.float32"):
        logits_of(ready_llama(FusedAccelerator()), randn(1, 3, 32), 2, 1)
