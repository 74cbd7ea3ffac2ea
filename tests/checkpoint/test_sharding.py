from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sphinxkit.checkpoint.keymap import hf_key_map, meta_key_map
from sphinxkit.checkpoint.sharding import (
    merge_shards,
    rotary_reorder,
    rotary_to_halves,
    rotary_to_pairs,
    shard_shape,
    take_shard,
)
from sphinxkit.errors import CheckpointError
from sphinxkit.tensor_files.lazy import StoredTensor


def shard(file: str, **tensors: torch.Tensor) -> dict[str, StoredTensor]:
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return {
        name: StoredTensor(Path(file), name, tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)
        for name, tensor in named.items()
    }


def test_two_shards_merged_by_hand() -> None:
    norm = torch.tensor([5.0, 6.0])
    first = shard(
        "0",
        tok_embeddings__weight=torch.tensor([[1.0], [2.0], [3.0]]),
        output__weight=torch.tensor([[1.0, 2.0]]),
        layers__0__attention__wo__weight=torch.tensor([[1.0], [2.0]]),
        layers__0__feed_forward__w1__weight=torch.tensor([[1.0, 2.0]]),
        layers__0__feed_forward__w2__weight=torch.tensor([[1.0], [2.0]]),
        norm__weight=norm,
    )
    second = shard(
        "1",
        tok_embeddings__weight=torch.tensor([[4.0], [5.0], [6.0]]),
        output__weight=torch.tensor([[3.0, 4.0]]),
        layers__0__attention__wo__weight=torch.tensor([[3.0], [4.0]]),
        layers__0__feed_forward__w1__weight=torch.tensor([[3.0, 4.0]]),
        layers__0__feed_forward__w2__weight=torch.tensor([[3.0], [4.0]]),
        norm__weight=norm.clone(),
    )
    entries, unused = merge_shards(Path("m"), [first, second], meta_key_map())
    assert unused == {}
    assert {name: entry.read().tolist() for name, entry in entries.items()} == {
        "llm.embed_tokens.weight": [[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]],
        "llm.lm_head.weight": [[1.0, 2.0], [3.0, 4.0]],
        "llm.layers.0.attention.o_proj.weight": [[1.0, 3.0], [2.0, 4.0]],
        "llm.layers.0.mlp.gate_proj.weight": [[1.0, 2.0], [3.0, 4.0]],
        "llm.layers.0.mlp.down_proj.weight": [[1.0, 3.0], [2.0, 4.0]],
        "llm.norm.weight": [5.0, 6.0],
    }


def test_every_fault_is_listed_at_once() -> None:
    first = shard("a.pth", norm__weight=torch.zeros(2), output__weight=torch.zeros(1, 2), what=torch.zeros(1))
    second = shard("b.pth", norm__weight=torch.zeros(3), what=torch.zeros(1))
    with pytest.raises(CheckpointError, match="the tensors do not fit together") as caught:
        merge_shards(Path("m"), [first, second], meta_key_map())
    message = str(caught.value)
    assert "b.pth: 'norm.weight' is [3] float32, but [2] float32 in a.pth" in message
    assert "'output.weight' is missing in b.pth; fetch the shards again" in message
    assert "'what' is not a name this format has" in message


def test_two_names_for_one_tensor() -> None:
    from sphinxkit.checkpoint.keymap import KeyMap, NameRule

    rules = [NameRule("a.*", "x.*"), NameRule("b.*", "x.*")]
    tensors = {"a.w": torch.zeros(1), "b.w": torch.zeros(1)}
    stored = {n: StoredTensor(Path("f"), n, (1,), t.dtype, lambda t=t: t) for n, t in tensors.items()}
    with pytest.raises(CheckpointError, match=r"'b.w' is a second tensor for 'x.w'"):
        merge_shards(Path("m"), [stored], KeyMap(rules))


def test_slices_and_their_shapes() -> None:
    tensor = torch.arange(12).reshape(4, 3)
    assert shard_shape((4, 3), 0, 2, "w") == (2, 3)
    assert shard_shape((4, 3), None, 2, "w") == (4, 3)
    assert take_shard(tensor, 0, 4, 2).tolist() == [[6, 7, 8]]
    assert take_shard(tensor, 1, 3, 1).tolist() == [[1], [4], [7], [10]]
    assert take_shard(tensor, None, 4, 2) is tensor
    with pytest.raises(CheckpointError, match=r"'w' \[4, 3\] cannot be split into 2 along dimension 1"):
        shard_shape((4, 3), 1, 2, "w")


def test_rotary_order_by_hand() -> None:
    # one head of width 6: Hugging Face keeps the even rows of Meta's first, then the odd ones
    pairs = torch.tensor([[0], [1], [2], [3], [4], [5]])
    halves = torch.tensor([[0], [2], [4], [1], [3], [5]])
    assert rotary_to_halves(pairs, 1).tolist() == halves.tolist()
    assert rotary_to_pairs(halves, 1).tolist() == pairs.tolist()
    two_heads = torch.tensor([[0], [2], [1], [3], [4], [6], [5], [7]])
    assert rotary_to_pairs(two_heads, 2).flatten().tolist() == list(range(8))


@given(heads=st.integers(1, 5), half=st.integers(1, 4), width=st.integers(1, 3))
def test_rotary_order_there_and_back(heads: int, half: int, width: int) -> None:
    rows = heads * 2 * half
    tensor = torch.arange(rows * width).reshape(rows, width)
    assert torch.equal(rotary_to_pairs(rotary_to_halves(tensor, heads), heads), tensor)
    assert torch.equal(rotary_to_halves(rotary_to_pairs(tensor, heads), heads), tensor)


def test_only_query_and_key_are_reordered() -> None:
    key_map = hf_key_map()
    tensor = torch.arange(8).reshape(8, 1)
    query = key_map.to_ours("model.layers.0.self_attn.q_proj.weight")
    key = key_map.to_ours("model.layers.0.self_attn.k_proj.weight")
    value = key_map.to_ours("model.layers.0.self_attn.v_proj.weight")
    assert query is not None
    assert key is not None
    assert value is not None
    reorder_query, reorder_key = rotary_reorder(query[1], 2, 1), rotary_reorder(key[1], 2, 1)
    assert reorder_query is not None
    assert reorder_key is not None
    assert torch.equal(reorder_query(tensor), rotary_to_pairs(tensor, 2))
    assert torch.equal(reorder_key(tensor), rotary_to_pairs(tensor, 1))
    assert rotary_reorder(value[1], 2, 1) is None
