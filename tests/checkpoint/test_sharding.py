from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sphinxkit.checkpoint.formats.meta import meta_key_map
from sphinxkit.checkpoint.keymap import KeyMap, NameRule
from sphinxkit.checkpoint.sharding import (
    MergedTensor,
    bitwise_equal,
    merge_shards,
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


def test_every_error_is_listed_at_once() -> None:
    first = shard("a.pth", norm__weight=torch.zeros(2), output__weight=torch.zeros(1, 2), what=torch.zeros(1))
    second = shard("b.pth", norm__weight=torch.zeros(3), what=torch.zeros(1))
    with pytest.raises(CheckpointError, match="the tensors do not fit together") as caught:
        merge_shards(Path("m"), [first, second], meta_key_map())
    message = str(caught.value)
    assert "b.pth: 'norm.weight' is [3] float32, but [2] float32 in a.pth" in message
    assert "'output.weight' is missing in b.pth; fetch the shards again" in message
    assert "'what' is not a name this format has" in message


def test_one_shard_twice() -> None:
    """Constant slices, as in made checkpoints, are equal by right; what every shard holds whole is, too."""
    slices = {"output__weight": torch.arange(20.0).reshape(10, 2), "tok_embeddings__weight": torch.zeros(3, 1)}
    whole = {"norm__weight": torch.tensor([5.0, 6.0])}

    def merged(*shards: dict[str, torch.Tensor]) -> dict[str, MergedTensor]:
        named = [shard(f"consolidated.0{rank}.pth", **each, **whole) for rank, each in enumerate(shards)]
        return merge_shards(Path("m"), named, meta_key_map())[0]

    other = {**slices, "output__weight": slices["output__weight"] + 1}
    with pytest.raises(CheckpointError, match=r"consolidated.02.pth is a copy of consolidated.00.pth: .* fetch both"):
        merged(slices, other, {name: tensor.clone() for name, tensor in slices.items()})
    last = slices["output__weight"].clone()
    last[-1, -1] = -1  # equal but for the last value
    assert merged(slices, {**slices, "output__weight": last})["llm.lm_head.weight"].read()[-1].tolist() == [18, -1]
    for value in (0.0, 1.0, float("nan")):
        constant = {name: torch.full_like(tensor, value) for name, tensor in slices.items()}
        assert merged(constant, constant)["llm.lm_head.weight"].shape == (20, 2)
    assert merged({"output__weight": torch.zeros(0, 2)}, {"output__weight": torch.zeros(0, 2)})


def test_two_names_for_one_tensor() -> None:
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


def stored(file: str, tensor: torch.Tensor) -> StoredTensor:
    return StoredTensor(Path(file), "w", tuple(tensor.shape), tensor.dtype, lambda: tensor)


def test_slices_are_joined_along_their_dimension() -> None:
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
    rows = MergedTensor([stored("0", a), stored("1", b)], dim=0)
    columns = MergedTensor([stored("0", a), stored("1", b)], dim=1)
    assert (rows.shape, columns.shape) == ((2, 2), (1, 4))
    assert rows.read().tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert columns.read().tolist() == [[1.0, 2.0, 3.0, 4.0]]
    out = torch.empty(1, 4, dtype=torch.float16)
    columns.copy_into(out)
    assert out.tolist() == [[1.0, 2.0, 3.0, 4.0]]


def test_copies_must_agree_unless_the_first_is_wanted() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([1.0, -0.0])
    parts = [stored("first.pth", a), stored("second.pth", b)]
    with pytest.raises(CheckpointError, match=r"second.pth: 'w' .* first.pth; pass replicas='first'"):
        MergedTensor(parts).read()
    with pytest.raises(CheckpointError, match="differs from"):
        MergedTensor(parts).copy_into(torch.empty(2))
    assert MergedTensor(parts, replicas="first").read() is a
    nan = torch.tensor([float("nan")])
    assert MergedTensor([stored("0", nan), stored("1", nan.clone())]).read() is nan


def test_parts_that_do_not_fit() -> None:
    with pytest.raises(CheckpointError, match=r"b.pth: 'w' is \[3\] float32, but \[2\] float32 in a.pth"):
        MergedTensor([stored("a.pth", torch.zeros(2)), stored("b.pth", torch.zeros(3))], dim=0)
    with pytest.raises(CheckpointError, match=r"\[2\] float16, but \[2\] float32"):
        MergedTensor([stored("a.pth", torch.zeros(2)), stored("b.pth", torch.zeros(2).half())], dim=0)
    with pytest.raises(CheckpointError, match=r"'w' is \[2\] float32, it has no dimension 1"):
        MergedTensor([stored("a.pth", torch.zeros(2)), stored("b.pth", torch.zeros(2))], dim=1)


def test_bitwise_equality() -> None:
    nan = torch.tensor([float("nan")])
    assert bitwise_equal(nan, nan.clone())
    assert not bitwise_equal(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not bitwise_equal(torch.zeros(2), torch.zeros(2, 1))
    assert not bitwise_equal(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    assert bitwise_equal(torch.tensor([1 + 2j]), torch.tensor([1 + 2j]))
    assert bitwise_equal(torch.tensor(True), torch.tensor(True))
    assert bitwise_equal(torch.arange(6).reshape(2, 3).T, torch.arange(6).reshape(2, 3).T.contiguous())
