from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree

from sphinxkit.llama import Attention, AttentionContext, AttentionPattern, KVCache, backends, precompute_freqs_cis

FP32_TOLERANCE = 3e-6  # float32 sums of a few dozen products of numbers of order 1


def step_for(x: Tensor, head_dim: int) -> AttentionContext:
    backend = backends.registry.build("eager")
    pattern = AttentionPattern(x.shape[0], x.shape[1], x.device)
    freqs_cis = precompute_freqs_cis(torch.arange(x.shape[1])[None], head_dim)
    return AttentionContext(freqs_cis, pattern, backend, backend.prepare(pattern, x.dtype))


@pytest.fixture
def attention() -> Attention:
    torch.manual_seed(0)
    return Attention(24, num_heads=6, num_kv_heads=2, head_dim=4)


def test_attention_is_the_papers_formula_with_turned_queries_and_keys(attention: Attention) -> None:
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
    weights = {name: attention.get_submodule(f"{name}_proj").weight.double() for name in "qkvo"}
    positions = torch.arange(5.0, dtype=torch.float64)
    angles = positions[:, None] * 10000.0 ** (-torch.arange(0, 4, 2, dtype=torch.float64) / 4)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # (S, 1, D/2)

    def turned(flat: Tensor) -> Tensor:
        pairs = torch.view_as_complex(flat.view(5, -1, 2, 2)) * turn
        return torch.view_as_real(pairs).flatten(-2)

    for row in range(2):
        q, k = (turned(x[row].double() @ weights[name].T) for name in "qk")
        v = (x[row].double() @ weights["v"].T).view(5, 2, 4)
        heads = []
        for head in range(6):
            scores = (q[:, head] @ k[:, head // 3].T) / 2.0
            scores = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf)
            heads.append(scores.softmax(-1) @ v[:, head // 3])
        exact = torch.cat(heads, -1) @ weights["o"].T
        torch.testing.assert_close(
            attention(x, step_for(x, 4), 0)[row], exact.float(), atol=FP32_TOLERANCE, rtol=FP32_TOLERANCE
        )


def test_heads_sharded_over_two_ranks_add_up(attention: Attention) -> None:
    x = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(1))
    total = torch.zeros(1, 5, 24)
    for rank in range(2):
        shard = Attention(24, num_heads=6, num_kv_heads=2, head_dim=4)
        for name in "qkv":
            projection = attention.get_submodule(f"{name}_proj")
            shard.get_submodule(f"{name}_proj").weight = torch.nn.Parameter(projection.weight.chunk(2)[rank])
        shard.o_proj.weight = torch.nn.Parameter(attention.o_proj.weight.chunk(2, dim=1)[rank])
        total = total + shard(x, step_for(x, 4), 0)
    torch.testing.assert_close(total, attention(x, step_for(x, 4), 0), atol=FP32_TOLERANCE, rtol=FP32_TOLERANCE)


def test_the_first_step_into_a_cache_leaves_turned_keys_there(attention: Attention) -> None:
    x = torch.randn(1, 3, 24, generator=torch.Generator().manual_seed(1))
    plain = step_for(x, 4)
    cache = KVCache(2, 1, 8, 2, 4)
    step = AttentionContext(plain.freqs_cis, plain.pattern, plain.backend, plain.state, cache, cache.prepare_write(3))
    attention(x, step, 1)
    expected = attention.k_proj(x).view(1, 3, 2, 4).transpose(1, 2)
    assert torch.equal(cache.keys[1][:, :, 0], expected[:, :, 0])  # position 0 is not turned
    assert not torch.equal(cache.keys[1][:, :, 1:3], expected[:, :, 1:])
    assert torch.equal(cache.values[1][:, :, :3], attention.v_proj(x).view(1, 3, 2, 4).transpose(1, 2))
    assert not cache.keys[0].any()
    assert not cache.keys[1].requires_grad


def test_wrappers_that_cast_arguments_leave_the_rotations_alone() -> None:
    x = torch.randn(1, 3, 24)
    step = step_for(x, 4)
    cast = _pytree.tree_map(lambda leaf: leaf.bfloat16() if isinstance(leaf, Tensor) else leaf, (x, step, 0))
    assert cast[0].dtype == torch.bfloat16
    assert cast[1] is step
