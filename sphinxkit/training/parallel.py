"""Processes and what each holds: device meshes, tensor parallelism, sharded weights, checkpointed layers."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sphinxkit.encoders.base import Encoder
from sphinxkit.errors import RecipeError
from sphinxkit.training.errors import TrainingError
from sphinxkit.training.plan import TrainPlan

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from sphinxkit.llama import LlamaModel

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class World:
    """Which process this is, and with whom it shares what.

    Args:
        rank: Of all processes.
        size: Of all processes.
        device: That this process computes on.
        mesh: (dp, tp); None: one process that shares nothing.
        checkpoint_group: For collectives of checkpoints that are written while training goes on.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None
    checkpoint_group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and folders."""
        return self.rank == 0

    @property
    def dp_rank(self) -> int:
        """Which part of every batch is this process's."""
        return 0 if self.mesh is None else self.mesh.get_local_rank("dp")

    @property
    def dp_size(self) -> int:
        """Into how many parts a batch is cut."""
        return 1 if self.mesh is None else self.mesh["dp"].size()

    @property
    def tp_size(self) -> int:
        """How many processes share every matrix."""
        return 1 if self.mesh is None else self.mesh["tp"].size()

    def reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduce over the processes that have other data; ``values`` is changed in place."""
        if self.mesh is not None and self.dp_size > 1:
            dist.all_reduce(values, op=op, group=self.mesh.get_group("dp"))
        return values

    def any(self, flag: bool) -> bool:
        """Whether a flag is set in any process."""
        if self.mesh is None or self.size == 1:
            return flag
        value = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value)

    def gather(self, value: Any) -> list[Any]:
        """A picklable value of every process, by rank."""
        if self.mesh is None or self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.mesh is not None and self.size > 1:
            dist.barrier()


def _pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise RecipeError(f"device: expected auto, cpu or cuda, got {name!r}")
    if name == "cuda":
        if not torch.cuda.is_available():
            raise TrainingError(f"device: cuda, but torch {torch.__version__} finds no CUDA device")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def check_sizes(plan: TrainPlan, num_processes: int, num_heads: int, num_kv_heads: int) -> tuple[int, int]:
    """(data-parallel, tensor-parallel) sizes.

    Raises:
        TrainingError: They do not fit the processes or the model's heads.
    """
    tensor = plan.tensor_parallel
    fsdp = num_processes // tensor if plan.fsdp is None else plan.fsdp
    if fsdp * tensor != num_processes:
        raise TrainingError(
            f"fsdp x tensor_parallel is {fsdp} x {tensor}, but {num_processes} processes were started (torchrun "
            "--nproc-per-node)"
        )
    if num_heads % tensor or num_kv_heads % tensor:
        raise TrainingError(
            f"tensor_parallel {tensor} does not divide the model's {num_heads} query and {num_kv_heads} key heads"
        )
    return fsdp, tensor


@contextmanager
def open_world(plan: TrainPlan, num_heads: int, num_kv_heads: int) -> Iterator[World]:
    """Join the processes that torchrun started, and part from them at the end.

    A single process in float32 shares nothing and needs no group. A single process in bfloat16 is a group of one: its
    float32 weights are cast by the same code as everybody's.

    Args:
        plan: Device, dtype and sizes.
        num_heads: Query heads of the language model.
        num_kv_heads: Its key heads.
    Raises:
        TrainingError: The sizes do not fit.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    dp, tp = check_sizes(plan, size, num_heads, num_kv_heads)
    device = _pick_device(plan.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size == 1 and plan.dtype == "float32":
        yield World(0, 1, device)
        return
    from torch.distributed.device_mesh import init_device_mesh

    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if size == 1:
        dist.init_process_group(backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend)
    try:
        mesh = init_device_mesh(device.type, (dp, tp), mesh_dim_names=("dp", "tp"))
        yield World(dist.get_rank(), size, device, mesh, dist.new_group(backend="gloo"))
        if size > 1:
            dist.barrier()
    finally:
        gc.collect()  # tensors that outlive their group abort the process at exit
        dist.destroy_process_group()


def _tensor_plan(llm: LlamaModel) -> dict[str, Any]:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    styles: dict[str, Any] = {
        "embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    for index in range(llm.num_layers):
        layer = f"layers.{index}."
        styles |= {f"{layer}attention.{name}": ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
        styles |= {f"{layer}mlp.{name}": ColwiseParallel() for name in ("gate_proj", "up_proj")}
        styles |= {f"{layer}attention.o_proj": RowwiseParallel(), f"{layer}mlp.down_proj": RowwiseParallel()}
    return styles


def checkpoint_layer(layer: nn.Module) -> None:
    """Let a layer compute again in the backward pass what it does not keep; changed in place."""
    from torch.utils.checkpoint import checkpoint

    forward = layer.forward
    layer.forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)


def _compile_layer(layer: nn.Module) -> None:
    """Compile what does not depend on the packing."""
    for name in ("attention_norm", "mlp_norm", "mlp"):
        part = layer.get_submodule(name)
        part.forward = torch.compile(part.forward, dynamic=True)


def _attend_plainly(encoder: nn.Module) -> None:
    """Let an encoder that a CPU trains in 16 bit attend by matrix products in float32.

    torch's fused CPU kernel has a backward pass that takes 5 times as long in bfloat16 as in float32 (65 tokens of 4
    heads of 32 channels); products and softmax in float32 take a third of the time for both passes, and are more exact.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    forward = encoder.forward

    def attend_plainly(*args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return forward(*args, **kwargs)

    encoder.forward = attend_plainly


def _need_gradient(module: nn.Module, inputs: Any, output: Tensor) -> None:
    """Let the backward pass go through every layer of a frozen model, also where a batch has no image.

    Processes gather weights in the backward pass together; a process whose text wants no gradient would not take part.
    """
    if torch.is_grad_enabled():
        output.requires_grad_(True)


def _attend_in_blocks(llm: LlamaModel) -> None:
    """Where the recipe leaves the choice to us: the backward pass of torch's attention is slow on a CPU in bfloat16."""
    if llm.attention == "auto":
        from sphinxkit.acceleration import BlockedAttention

        llm.attention_backend = BlockedAttention()


def parallelize(root: nn.Module, llm: LlamaModel, world: World, plan: TrainPlan) -> None:
    """Share matrices and weights among the processes and prepare the layers, in place.

    Frozen parameters outside of the language model (encoders) are left whole in every process, so that a process
    without images need not wait for one that has some.

    Args:
        root: Its ``forward`` is the training loss; holds ``llm`` and everything else.
        llm: May be on the meta device.
        world: The processes.
        plan: Checkpointing, compilation, dtype.
    """
    if world.mesh is not None and world.tp_size > 1:
        from torch.distributed.tensor.parallel import parallelize_module

        parallelize_module(llm, world.mesh["tp"], _tensor_plan(llm))
    for layer in llm.layers:
        if plan.compile:
            _compile_layer(layer)
        if plan.activation_checkpointing:
            checkpoint_layer(layer)
    if world.device.type == "cpu" and plan.dtype == "bfloat16":
        _attend_in_blocks(llm)
        for encoder in root.modules():
            if isinstance(encoder, Encoder) and encoder.trainable:
                _attend_plainly(encoder)
    if world.mesh is None:
        return
    if not llm.embed_tokens.weight.requires_grad:
        llm.embed_tokens.register_forward_hook(_need_gradient)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=DTYPES[plan.dtype], reduce_dtype=torch.float32, cast_forward_inputs=False)
    inside = {id(parameter) for parameter in llm.parameters()}
    ignored = {p for p in root.parameters() if not p.requires_grad and id(p) not in inside}
    mesh = world.mesh["dp"]
    for layer in llm.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh, mp_policy=policy, ignored_params=ignored)


def materialize(root: nn.Module, device: torch.device) -> None:
    """Give memory to what is still on the meta device, and to nothing else."""
    root._apply(  # type: ignore[no-untyped-call]
        lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor
    )
