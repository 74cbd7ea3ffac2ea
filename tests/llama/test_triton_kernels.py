"""The kernels beside the operators they stand for: on a CPU through Triton's interpreter, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sphinxkit.llama import KVCache, LlamaModel, kernels, quantize
from sphinxkit.llama.kernels import RowFusion, expand_codes, find_kernels, multiply_row, pack_codes
from sphinxkit.llama.layers import apply_rope, precompute_freqs_cis
from sphinxkit.llama.quantization import QuantizedLinear, _quantize_groups, _quantize_rows

# float32: sums in another order. 16 bit: both round at the same places, so that a value at the border between two
# neighbours may fall on the other side: a step of the format, at values up to 4.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# bfloat16 rounds to 2^-9 of each number, over two layers; see test_model.py
BF16_RELATIVE_TOLERANCE = 0.06

Builder = Callable[..., LlamaModel]


def check(device: str, dtype: torch.dtype) -> None:
    """Compare what takes any rows at widths that fill no block."""
    from sphinxkit.llama import triton_kernels, triton_quantized

    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def close(found: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])

    x, delta, weight = randn(3, 2, 96), randn(3, 2, 96), randn(96)
    for added in (None, delta):
        total, normed = triton_kernels.add_rms_norm(x, added, weight, 1e-5)
        expected = x if added is None else x + added
        assert torch.equal(total, expected)
        close(normed, F.rms_norm(expected, (96,), None, 1e-5) * weight)
    gate_up = randn(3, 2, 2 * 1500)
    gate, up = gate_up.chunk(2, -1)
    close(triton_kernels.silu_mul(gate_up), F.silu(gate) * up)
    starts = torch.tensor([0, 9, 4], device=device)
    qkv, freqs_cis = randn(3, 1, 4 + 2 * 2, 24), precompute_freqs_cis(starts[:, None], 24)
    keys, values = (torch.zeros(3, 10, 2, 24, dtype=dtype, device=device).transpose(1, 2) for _ in range(2))
    queries = triton_kernels.rotate_and_store(qkv, freqs_cis, starts, keys, values)
    rotated, rows = apply_rope(qkv[:, :, :6], freqs_cis), torch.arange(3, device=device)
    close(queries, rotated[:, :, :4])
    expected_keys, expected_values = torch.zeros_like(keys), torch.zeros_like(values)
    expected_keys[rows, :, starts], expected_values[rows, :, starts] = rotated[:, 0, 4:], qkv[:, 0, 6:]
    close(keys, expected_keys)
    assert torch.equal(values, expected_values)
    for bits, group_size, width in ((8, 64, 96), (8, 64, 64), (4, 32, 96), (4, 64, 640), (8, 64, 640)):
        # not row by row in memory; not a multiple of what a program takes
        weight, outputs = randn(width, 48).T, 43
        codes, scales = (
            _quantize_rows(weight) if bits == 8 else _quantize_groups(weight, group_size)
        )  # as QuantizedLinear has them on CUDA
        codes = pack_codes(codes if bits == 4 else codes.int() + 128, bits)
        if bits == 4:
            scales = scales.transpose(0, 1).contiguous()
        expanded = expand_codes(codes, scales, bits, group_size, torch.float32)
        step = weight.float().abs().amax() / (100 if bits == 8 else 5)
        assert (expanded - weight.float()).abs().amax() < step
        found = triton_quantized.expand(codes[:outputs], scales[:outputs], bits, group_size, dtype)
        close(found, expanded[:outputs].to(dtype))
        for rows in (1, 2, 17):
            x = randn(rows, width)
            found = triton_quantized.quantized_linear(x, codes[:outputs], scales[:outputs], bits, group_size)
            wanted = x.float() @ expanded[:outputs].T
            # the expanded weight is rounded once in 16 bit, the products are summed in float32
            close(found / width**0.5, (wanted / width**0.5).to(dtype))


def check_rows(device: str, dtype: torch.dtype) -> None:
    """One row's products with all that can be fused into them, at sizes that fill no block, and more than one."""
    from sphinxkit.llama import triton_quantized, triton_rows

    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    for outputs, width in ((42, 96), (18, 1280)):
        weight = randn(48, width) / width**0.5
        x, norm, residual = randn(1, 1, width), randn(width), randn(1, 1, outputs)
        packed = []
        for bits in (8, 4):
            codes, scales = _quantize_rows(weight) if bits == 8 else _quantize_groups(weight, 32)
            codes = pack_codes(codes if bits == 4 else codes.int() + 128, bits)
            scales = scales if bits == 8 else scales.transpose(0, 1).contiguous()
            packed.append((codes[:outputs], scales[:outputs].contiguous(), bits, 32))
        for fusion in (
            RowFusion(),
            RowFusion(norm, 1e-5),
            RowFusion(residual=residual),
            RowFusion(gated=True),
            RowFusion(norm, 1e-5, residual),
            RowFusion(norm, 1e-5, gated=True),
        ):
            found = triton_rows.linear_row(x, weight[:outputs], fusion)
            wanted = multiply_row(x, weight[:outputs], fusion)
            torch.testing.assert_close(found.float(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
            for codes, scales, bits, group_size in packed:
                found = triton_quantized.quantized_row(x, codes, scales, bits, group_size, fusion)
                wanted = multiply_row(x, expand_codes(codes, scales, bits, group_size, torch.float32), fusion)
                torch.testing.assert_close(found.float(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def check_attention(device: str, dtype: torch.dtype) -> None:
    """Attention of one token per row beside plain products in float64; the cache is not packed."""
    from sphinxkit.llama import backends, triton_attention
    from sphinxkit.llama.cache import KVCache

    generator = torch.Generator().manual_seed(0)
    for heads, groups, head_dim, held in ((6, 6, 24, (0, 63, 64, 333)), (16, 2, 64, (5,)), (4, 1, 128, (400, 7))):
        cache = KVCache(1, len(held), 420, groups, head_dim, device=device, dtype=dtype, static_shapes=True)
        q = torch.randn(len(held), heads, 1, head_dim, generator=generator).to(device, dtype)
        for tensor in (cache.keys[0], cache.values[0]):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        cache.lengths.copy_(torch.tensor(held))
        cache.lengths_changed()
        pattern = backends.AttentionPattern(len(held), 1, q.device, step=cache.plan(1))
        assert pattern.step is not None
        keys, values = cache.read(0, pattern.step)
        found = triton_attention.attend_token(q, keys, values, pattern.step.starts)
        oracle = backends.EagerAttention()
        expected = oracle.attend(q.double(), keys.double(), values.double(), pattern, pattern.mask())
        # weights are rounded to 16 bit for grouped heads' products, sums are float32
        torch.testing.assert_close(found.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


class Broken:
    """Stands for kernels that a compiler got wrong, or did not get."""

    def __init__(self, kernels: Any, error: Exception | None = None) -> None:
        self._kernels, self._error = kernels, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        if self._error is not None:
            raise self._error
        return gate_up[..., ::2]


def check_probe(device: str, dtype: torch.dtype) -> None:
    """The probe accepts the kernels and names what is wrong with others."""
    from sphinxkit.llama import triton_attention, triton_kernels, triton_quantized, triton_rows
    from sphinxkit.llama.kernels import kernel_fault

    where = torch.device(device)
    assert kernel_fault(triton_kernels, where, "layers", dtype) is None
    assert kernel_fault(triton_rows, where, "rows", dtype) is None
    assert kernel_fault(triton_quantized, where, "quantized", dtype) is None
    assert kernel_fault(triton_attention, where, "token", dtype) is None
    assert str(kernel_fault(Broken(triton_kernels), where, dtype=dtype)).startswith("wrong numbers: silu_mul by")
    broken = Broken(triton_kernels, RuntimeError("no such instruction"))
    assert kernel_fault(broken, where, dtype=dtype) == "a probing call failed: RuntimeError: no such instruction"


def check_layers(quantized: bool) -> None:
    """Fused layers go through the kernels on a CPU, too, where they are made to: prompts and tokens of ragged rows."""
    from sphinxkit.llama import fused, triton_kernels, triton_quantized, triton_rows

    sizes = {"vocab_size": 61, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "hidden_dim": 64}
    model = LlamaModel(**sizes, max_seq_len=20).requires_grad_(False)
    model.init_weights(torch.Generator().manual_seed(0))
    if quantized:
        quantize(model, 8)
    model.fuse()
    embeds = torch.randn(3, 12, 32, generator=torch.Generator().manual_seed(0))

    def start(rows: int) -> KVCache:
        cache = model.make_cache(rows)
        model(embeds[:rows, :7], cache=cache, lengths=[7, 1, 4][:rows])
        return cache

    def go_on(cache: KVCache) -> torch.Tensor:
        rows = cache.batch_size
        return torch.stack([model(embeds[:rows, 8 + step : 9 + step], cache=cache) for step in range(3)])

    expected = {rows: go_on(start(rows)) for rows in (3, 1)}
    row = start(1)
    for linear in model.modules():
        if isinstance(linear, QuantizedLinear):  # as they are on CUDA
            linear.codes = pack_codes(linear.codes.int() + 128, 8)
    model.fuse()
    calls: list[str] = []

    class Counted:
        def __init__(self, module: Any) -> None:
            self._module = module

        def __getattr__(self, name: str) -> Any:
            calls.append(name)
            return getattr(self._module, name)

    modules = {"layers": triton_kernels, "rows": triton_rows, "quantized": triton_quantized}
    fused._can_use_kernels = lambda x: True
    fused.find_kernels = lambda device, kind="layers": Counted(modules[kind])  # type: ignore[assignment]
    torch.testing.assert_close(go_on(row), expected[1], atol=1e-5, rtol=0)
    product = "quantized_row" if quantized else "linear_row"
    assert {name: calls.count(name) for name in set(calls)} == {product: 24, "rotate_and_store": 6}
    if quantized:  # a CPU has no way from these codes to a product of several rows
        return
    calls.clear()
    torch.testing.assert_close(go_on(start(3)), expected[3], atol=1e-5, rtol=0)
    assert {name: calls.count(name) for name in set(calls)} == {
        "add_rms_norm": 16,
        "silu_mul": 8,
        "rotate_and_store": 6,
    }


def test_there_are_none_for_a_cpu() -> None:
    assert find_kernels(torch.device("cpu")) is None


def test_there_are_none_for_a_device_that_is_not_current(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    kernels._warn_of_device.cache_clear()
    for _ in range(2):
        assert find_kernels(torch.device("cuda", 1)) is None
    assert len(caplog.messages) == 1
    assert "not torch's current device" in caplog.text


@pytest.mark.parametrize("dtype", ["float16", "float32"])  # its bfloat16 cuts digits off instead of rounding
def test_interpreted(dtype: str) -> None:
    pytest.importorskip("triton")
    code = (
        f"import sys, torch\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_triton_kernels import *\n"
        "from sphinxkit.llama import triton_quantized\n"
        f"dtype = torch.{dtype}\ncheck('cpu', dtype)\ncheck_rows('cpu', dtype)\ncheck_attention('cpu', dtype)\n"
        "triton_quantized.MANY_OUTPUTS = 40  # every output takes long here\n"
        "check_rows('cpu', dtype)\ncheck_probe('cpu', dtype)\n"
        f"check_layers({dtype == 'float32'})"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    check("cuda", dtype)
    check_rows("cuda", dtype)
    check_attention("cuda", dtype)
    check_probe("cuda", dtype)
    for kind in ("layers", "rows", "quantized", "token"):
        assert find_kernels(torch.device("cuda"), kind) is not None


@pytest.mark.gpu
@pytest.mark.parametrize("num_kv_heads", [2, 4])
@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
def test_fused_layers_go_through_them(small_llama: Builder, num_kv_heads: int, kernels: bool, rows: int) -> None:
    exact = small_llama(num_kv_heads=num_kv_heads).requires_grad_(False)
    half = small_llama(num_kv_heads=num_kv_heads).requires_grad_(False).to("cuda", torch.bfloat16)
    exact.load_state_dict(half.state_dict())
    half.fuse(kernels=kernels)
    embeds = torch.randn(rows, 12, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    expected = exact(embeds.float())
    cache, lengths = half.make_cache(rows), torch.tensor([7, 1, 4][:rows])
    logits = half(embeds[:, :7].cuda(), cache=cache, lengths=lengths)
    tolerance = BF16_RELATIVE_TOLERANCE * float(expected.std())
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(logits[row, :length].float().cpu(), expected[row, :length], atol=tolerance, rtol=0)
    each = torch.arange(rows)
    for _ in range(5):
        found = half(embeds[each, lengths][:, None].cuda(), cache=cache)
        torch.testing.assert_close(found.float().cpu(), expected[each, lengths][:, None], atol=tolerance, rtol=0)
        lengths += 1
