"""What each process holds and computes in; the other processes are torch's fake ones, which answer nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from sphinxkit.data.collate import Example, collate_packed
from sphinxkit.recipe import build
from sphinxkit.training import LossModule, TrainPlan
from sphinxkit.training.parallel import ParallelDims
from sphinxkit.training.sharding import parallelize
from sphinxkit.training.trainable_model import choose_trained

CPU = torch.device("cpu")


@pytest.fixture
def make_dims() -> Iterator[Callable[..., ParallelDims]]:
    """The first process of a mesh of (dp_replicate, dp_shard, tp)."""

    def make(*sizes: int) -> ParallelDims:
        count = sizes[0] * sizes[1] * sizes[2]
        dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("dp_replicate", "dp_shard", "tp"))
        return ParallelDims(0, count, CPU, mesh, mesh["dp_replicate", "dp_shard"]._flatten("dp"))

    yield make
    dist.destroy_process_group()


def make_module(document: dict[str, Any], dims: ParallelDims) -> LossModule:
    plan = TrainPlan(**document)
    model = build(document["model"])
    choose_trained(model, plan)
    module = LossModule(model)
    parallelize(module, model.llm, dims, plan)
    return module


def run(module: LossModule) -> dict[str, torch.Tensor]:
    """One forward and backward pass; what some layers gave."""
    seen: dict[str, torch.Tensor] = {}
    llm = module.model.llm
    for name in ("lm_head", "layers.0.mlp.gate_proj", "layers.0.attention.q_proj"):
        keep = llm.get_submodule(name)
        keep.register_forward_hook(lambda _, __, output, name=name: seen.setdefault(name, output))
    module(collate_packed([Example("a", [1, 5, 6, 7], [-100, 5, 6, 7], None)]))[0].backward()
    return seen


def test_tensor_parallelism_splits_every_matrix_and_gives_whole_logits(document, make_dims) -> None:
    module = make_module(document(tensor_parallel=2, train=["llm"]), make_dims(1, 1, 2))
    llm = module.model.llm
    widths = {"q_proj": (8, 16), "k_proj": (4, 16), "v_proj": (4, 16), "o_proj": (16, 8)}
    widths |= {"gate_proj": (16, 16), "up_proj": (16, 16), "down_proj": (16, 16)}
    for name, parameter in llm.named_parameters():
        assert isinstance(parameter, DTensor)
        leaf = name.split(".")[-2]
        if leaf in widths:
            assert tuple(parameter.to_local().shape) == widths[leaf], name
    for table in (llm.lm_head, llm.embed_tokens):
        assert tuple(table.weight.to_local().shape) == (256, 16)  # half of the vocabulary each
    seen = run(module)
    assert tuple(seen["lm_head"].shape) == (3, 512)  # gathered for the loss
    assert not isinstance(seen["lm_head"], DTensor)
    assert seen["layers.0.mlp.gate_proj"].shape[-1] == 16
    assert all(parameter.grad is not None for parameter in llm.parameters())


@pytest.mark.parametrize(("dtype", "found"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_float32_weights_compute_in_the_plans_dtype(document, make_dims, dtype: str, found: torch.dtype) -> None:
    module = make_module(document(dtype=dtype), make_dims(1, 2, 1))
    seen = run(module)
    assert {tensor.dtype for tensor in seen.values()} == {found}
    assert tuple(seen["lm_head"].shape) == (3, 512)
    for name, parameter in module.model.llm.named_parameters():
        assert parameter.placements == (Shard(0),), name
        assert parameter.dtype == parameter.grad.dtype == torch.float32


def test_replicated_groups_hold_whole_copies_of_their_shards(document, make_dims) -> None:
    dims = make_dims(2, 2, 1)
    assert (dims.dp_size, dims.tp_size, dims.dp_rank) == (4, 1, 0)
    module = make_module(document(dp_replicate=2, dp_shard=2), dims)
    run(module)
    for name, parameter in module.model.llm.named_parameters():
        assert parameter.placements == (Replicate(), Shard(0)), name
        assert parameter.grad.placements == parameter.placements


def test_frozen_encoders_stay_whole(document, make_dims) -> None:
    module = make_module(document(), make_dims(1, 2, 1))
    for name, parameter in module.named_parameters():
        assert isinstance(parameter, DTensor) is (".encoders." not in name), name
