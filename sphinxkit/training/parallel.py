"""Parallel layout of a run: rank, device mesh and process groups."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from sphinxkit.errors import RecipeError
from sphinxkit.training.errors import TrainingError
from sphinxkit.training.plan import TrainPlan

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class ParallelDims:
    """Rank, device mesh and process groups of one process.

    Args:
        rank: Global rank.
        size: Number of processes.
        device: Device of this process.
        mesh: Device mesh with dimensions dp_replicate, dp_shard and tp; None: one process without a group.
        data_mesh: Data-parallel processes: dp_replicate and dp_shard as one dimension.
        checkpoint_group: Process group of asynchronous checkpoints.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None
    data_mesh: DeviceMesh | None = None
    checkpoint_group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and folders."""
        return self.rank == 0

    @property
    def dp_rank(self) -> int:
        """Data-parallel rank: the part of every batch that this process reads."""
        return 0 if self.data_mesh is None else self.data_mesh.get_local_rank()

    @property
    def dp_size(self) -> int:
        """Data-parallel size: the number of parts of a batch."""
        return 1 if self.data_mesh is None else self.data_mesh.size()

    @property
    def tp_size(self) -> int:
        """Tensor-parallel size: the number of processes that share every matrix."""
        return 1 if self.mesh is None else self.mesh["tp"].size()

    @property
    def fsdp_mesh(self) -> DeviceMesh:
        """Mesh over which FSDP shards the weights: (dp_replicate, dp_shard), or dp_shard alone.

        Raises:
            TrainingError: There is no mesh.
        """
        if self.mesh is None:
            raise TrainingError("a single process without a group shards nothing")
        return self.mesh["dp_replicate", "dp_shard"] if self.mesh["dp_replicate"].size() > 1 else self.mesh["dp_shard"]

    def reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduce over the data-parallel processes; ``values`` is changed in place.

        Shape:
            values: any
            return: as ``values``
        """
        if self.data_mesh is not None and self.dp_size > 1:
            dist.all_reduce(values, op=op, group=self.data_mesh.get_group())
        return values

    def any(self, flag: bool) -> bool:
        """Whether a flag is set in any process."""
        if self.mesh is None or self.size == 1:
            return flag
        value = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value)

    def gather(self, value: Any) -> list[Any]:
        """Gather a picklable value from every process, by rank."""
        if self.mesh is None or self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def shared_errors(self) -> Iterator[None]:
        """After the block, raise an error of any process in every process, so that none waits forever."""
        error: Exception | None = None
        try:
            yield
        except Exception as found:
            error = found
        if self.any(error is not None):
            raise next(found for found in self.gather(error) if found is not None)

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


def count_processes(environment: Mapping[str, str]) -> int:
    """The number of processes that torchrun started; 1 without torchrun.

    Args:
        environment: Environment variables of this process.
    Raises:
        TrainingError: Slurm started several processes without torchrun: each would train alone, in one folder.
    """
    if "WORLD_SIZE" in environment:
        return int(environment["WORLD_SIZE"])
    tasks = environment.get("SLURM_NTASKS", "1")
    if tasks.isdigit() and int(tasks) > 1:
        nodes = environment.get("SLURM_NNODES", "1")
        per_node = -(-int(tasks) // int(nodes)) if nodes.isdigit() and int(nodes) else int(tasks)
        raise TrainingError(
            f"Slurm runs {tasks} tasks (SLURM_NTASKS), but torchrun did not start this process: every task would train "
            f"alone. Start one task per node, which starts the others: srun --ntasks={nodes} --ntasks-per-node=1 "
            f"torchrun --nnodes {nodes} --nproc-per-node {per_node} --rdzv-backend c10d --rdzv-endpoint HEAD:29500 "
            "-m sphinxkit train ... (recipes/slurm/train.sbatch does so). For one process: torchrun --nproc-per-node 1"
        )
    return 1


def mesh_sizes(plan: TrainPlan, num_processes: int) -> tuple[int, int, int]:
    """Sizes of the mesh's dimensions: dp_replicate, dp_shard, tp.

    Args:
        plan: The sizes asked for.
        num_processes: Number of started processes.
    Raises:
        TrainingError: They do not fit the number of processes.
    """
    replicate, tensor = plan.dp_replicate, plan.tensor_parallel
    shard = max(1, num_processes // (replicate * tensor)) if plan.dp_shard is None else plan.dp_shard
    if replicate * shard * tensor != num_processes:
        raise TrainingError(
            f"dp_replicate x dp_shard x tensor_parallel is {replicate} x {shard} x {tensor}, but {num_processes} "
            "processes were started (torchrun --nproc-per-node)"
        )
    return replicate, shard, tensor


def check_tensor_parallel(plan: TrainPlan, num_heads: int, num_kv_heads: int) -> None:
    """Raise if tensor parallelism cannot split the language model.

    Args:
        plan: Holds ``tensor_parallel``.
        num_heads: Query heads of the language model.
        num_kv_heads: Its key and value heads.
    Raises:
        TrainingError: It does not divide the heads.
    """
    tensor = plan.tensor_parallel
    if num_heads % tensor or num_kv_heads % tensor:
        raise TrainingError(
            f"tensor_parallel {tensor} does not divide the model's {num_heads} query and {num_kv_heads} key heads"
        )


@contextmanager
def open_parallel_dims(plan: TrainPlan) -> Iterator[ParallelDims]:
    """Join the process group that torchrun started; leave it at the end.

    A single process in float32 needs no group. A single process in bfloat16 is a group of one: FSDP casts its float32
    weights, as it does for many processes.

    Args:
        plan: Device, dtype and sizes.
    Raises:
        TrainingError: The sizes do not fit, or the processes were not started by torchrun.
    """
    size = count_processes(os.environ)
    sizes = mesh_sizes(plan, size)
    device = _pick_device(plan.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size == 1 and plan.dtype == "float32":
        yield ParallelDims(0, 1, device)
        return
    from torch.distributed.device_mesh import init_device_mesh

    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if size == 1:
        dist.init_process_group(backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend)
    try:
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("dp_replicate", "dp_shard", "tp"))
        data_mesh = mesh["dp_replicate", "dp_shard"]._flatten("dp")
        yield ParallelDims(dist.get_rank(), size, device, mesh, data_mesh, dist.new_group(backend="gloo"))
        if size > 1:
            dist.barrier()
    finally:
        gc.collect()  # tensors that outlive their group abort the process at exit
        dist.destroy_process_group()
