"""Attention over packed samples by matrix products, beside ten lines of float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sphinxkit.acceleration.cpu import attention
from sphinxkit.acceleration.cpu.attention import BlockedAttention, causal_attention, packed_attention
from sphinxkit.llama import AttentionPattern, LlamaModel, backends
from sphinxkit.training.sharding import _attend_in_blocks

# bfloat16 has 8 bits: the weights, the output and every product of the backward pass are rounded to 2^-9 of their size,
# and a few such roundings add up; torch's own kernel has 1.7e-3 to 4.6e-3 on these sizes
TOLERANCE = 8e-3
LENGTHS = (1, 7, 130, 300)  # a single token; several blocks, the last one not full


def oracle(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    parts = []
    for queries, keys, values in zip(*(torch.split(x, lengths, dim=2) for x in (q, k, v)), strict=True):
        scores = queries @ keys.transpose(-1, -2) / q.shape[-1] ** 0.5
        unseen = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        parts.append(scores.masked_fill(unseen, -torch.inf).softmax(-1) @ values)
    return torch.cat(parts, dim=2)


def draw(dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = (1, sum(LENGTHS), 3, 16)
    return [torch.randn(size, generator=generator).mul(2).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3)]


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.detach().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_and_gradients_are_those_of_float64(dtype: torch.dtype) -> None:
    inputs = draw(dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, expected = packed_attention(*inputs, LENGTHS), oracle(*exact, LENGTHS)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert out.dtype == dtype
    assert relative(out, expected.detach()) < TOLERANCE
    found = torch.autograd.grad(out, inputs, grad)
    for got, wanted in zip(found, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        assert got.dtype == dtype
        assert relative(got, wanted) < TOLERANCE


def test_samples_do_not_see_each_other_nor_the_future() -> None:
    q, k, v = draw(torch.bfloat16)
    before = packed_attention(q, k, v, LENGTHS)
    keys, values = k.detach().clone(), v.detach().clone()
    start = sum(LENGTHS[:2])
    last = start + 129  # of the third sample
    keys[:, :, last] += 1
    values[:, :, last] -= 1
    changed = (packed_attention(q, keys, values, LENGTHS) != before).any(dim=-1).any(dim=1)[0]
    assert changed.nonzero().flatten().tolist() == [last]


def test_a_cpu_that_trains_in_16_bit_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def spy(*args: object) -> Tensor:
        calls.append(args[-1])
        return packed_attention(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("sphinxkit.acceleration.cpu.attention.packed_attention", spy)
    pattern = AttentionPattern(1, sum(LENGTHS), torch.device("cpu"), seq_lens=LENGTHS)
    backend = BlockedAttention()
    half, single = draw(torch.bfloat16), draw(torch.float32)
    out = backend.attend(*half, pattern, None)
    assert calls == [LENGTHS]
    with torch.no_grad():
        plain = backend.attend(*half, pattern, None)
    backend.attend(*single, pattern, None)
    monkeypatch.setattr("sphinxkit.acceleration.cpu.attention.MAX_LENGTH", max(LENGTHS) - 1)
    backend.attend(*half, pattern, None)
    assert len(calls) == 1
    assert relative(out, plain.double()) < TOLERANCE


def test_block_bounds_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = draw(torch.bfloat16)
    blocked = packed_attention(*inputs, LENGTHS)
    monkeypatch.setattr(attention, "_BLOCK", 512)
    # the same sums over the same float32 scores; softmax may add them up in another order
    assert relative(blocked, packed_attention(*inputs, LENGTHS).detach().double()) < 1e-3


def rows_of(batch: int, length: int, dtype: torch.dtype = torch.bfloat16, heads: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    size = (batch, length, heads, 16)
    return [torch.randn(size, generator=generator).mul(2).to(dtype).transpose(1, 2) for _ in range(3)]


@pytest.mark.parametrize("scores", [1, 700, 300_000])  # blocks of one query; of a few; of 64, all heads at once
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 131), (1, 300)])
def test_rows_are_those_of_float64(monkeypatch: pytest.MonkeyPatch, scores: int, batch: int, length: int) -> None:
    monkeypatch.setattr(attention, "_SCORES", scores)
    q, k, v = rows_of(batch, length)
    expected = torch.cat([oracle(*(x[i : i + 1].double() for x in (q, k, v)), (length,)) for i in range(batch)])
    out = causal_attention(q, k, v)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert out.transpose(1, 2).is_contiguous()
    assert relative(out, expected) < TOLERANCE


def test_long_rows_without_gradients_are_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def count(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(q.shape[2])
        return causal_attention(q, k, v)

    monkeypatch.setattr(attention, "causal_attention", count)
    monkeypatch.setattr(attention, "_has_no_tiles", lambda: True)
    monkeypatch.setattr(attention, "BLOCKED_LENGTHS", range(64, 200))
    backend = BlockedAttention()

    def attend(length: int, *, grad: bool = False, dtype: torch.dtype = torch.bfloat16) -> None:
        inputs = [x.requires_grad_(grad) for x in rows_of(2, length, dtype)]
        pattern = AttentionPattern(2, length, torch.device("cpu"))
        out = backend.attend(*inputs, pattern, backend.prepare(pattern, dtype))
        exact = torch.cat([oracle(*(x[i : i + 1].double() for x in inputs), (length,)) for i in range(2)])
        assert relative(out, exact.detach()) < TOLERANCE

    attend(64)
    attend(199)
    assert calls == [64, 199]
    attend(63)
    attend(200)
    attend(64, grad=True)
    attend(64, dtype=torch.float32)
    assert calls == [64, 199]
    with torch.no_grad():
        attend(64, grad=True)
    assert calls == [64, 199, 64]
    monkeypatch.setattr(attention, "_has_no_tiles", lambda: False)
    attend(64)
    assert calls == [64, 199, 64]


@pytest.mark.parametrize(
    ("features", "expected"),
    [({"avx512_bf16": True, "amx_bf16": False}, True), ({"avx512_bf16": True, "amx_bf16": True}, False), ({}, False)],
)
def test_which_processors_want_blocks(
    monkeypatch: pytest.MonkeyPatch, features: dict[str, bool], expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    attention._has_no_tiles.cache_clear()
    try:
        assert attention._has_no_tiles() is expected
    finally:
        attention._has_no_tiles.cache_clear()


def test_it_has_a_name_and_is_sdpa_elsewhere() -> None:
    backend = backends.registry.build("sphinxkit.acceleration:BlockedAttention")
    assert isinstance(backend, BlockedAttention)
    q, k, v = rows_of(1, 20, heads=4)
    grouped = [x[:, :2] for x in (k, v)]
    for seq_lens in (None, (7, 13)):
        pattern = AttentionPattern(1, 20, torch.device("cpu"), seq_lens=seq_lens)
        expected = backends.registry.build("sdpa").attend(q, *grouped, pattern, None)
        assert torch.equal(backend.attend(q, *grouped, pattern, None), expected)


def test_training_in_bfloat16_on_a_cpu_takes_it_where_the_choice_is_open(
    small_llama: Callable[..., LlamaModel],
) -> None:
    left, named = small_llama(attention="auto"), small_llama(attention="sdpa")
    for llm in (left, named):
        _attend_in_blocks(llm)
    assert type(left.attention_backend) is BlockedAttention
    assert type(named.attention_backend) is backends.SDPAAttention


def test_grouped_heads_learn_too() -> None:
    q, k, v = (x.detach()[:, : 4 if index == 0 else 2].requires_grad_() for index, x in enumerate(draw4()))
    pattern = AttentionPattern(1, sum(LENGTHS), torch.device("cpu"), seq_lens=LENGTHS)
    found = []
    for backend in (BlockedAttention(), backends.registry.build("eager")):
        out = backend.attend(q, k, v, pattern, backend.prepare(pattern, q.dtype))
        found.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
    for got, expected in zip(*found, strict=True):
        assert relative(got, expected.detach().double()) < 3 * TOLERANCE  # both round


def draw4() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    size = (1, sum(LENGTHS), 4, 16)
    return [torch.randn(size, generator=generator).bfloat16().transpose(1, 2) for _ in range(3)]
