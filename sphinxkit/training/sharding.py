"""Parallelises a model: tensor parallelism, sharded weights, activation checkpointing."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from sphinxkit.encoders.base import Encoder
from sphinxkit.llama.moe import Experts
from sphinxkit.training.parallel import DTYPES, ParallelDims
from sphinxkit.training.plan import TrainPlan

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from sphinxkit.llama import LlamaModel


def _tensor_plan(llm: LlamaModel) -> dict[str, Any]:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

    styles: dict[str, Any] = {
        "embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    norms = ("q_norm", "k_norm") if llm.qk_norm else ()
    for index in range(llm.num_layers):
        layer = f"layers.{index}."
        # each process has some heads, and the weights' gradient is the sum over all
        styles |= {
            f"{layer}attention.{name}": SequenceParallel(sequence_dim=2, use_local_output=True) for name in norms
        }
        styles |= {f"{layer}attention.{name}": ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
        styles[f"{layer}attention.o_proj"] = RowwiseParallel()
        if llm.moe is None:
            styles |= {f"{layer}mlp.{name}": ColwiseParallel() for name in ("gate_proj", "up_proj")}
            styles[f"{layer}mlp.down_proj"] = RowwiseParallel()
    return styles


def _split_experts(experts: Experts, mesh: DeviceMesh) -> None:
    """Give every process a part of each expert's hidden width, in place. Outputs are summed, the router is whole."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor

    def split(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for key, weight in list(module.named_parameters()):
            parts = distribute_tensor(weight, mesh, [Shard(1)])
            module.register_parameter(key, nn.Parameter(parts, weight.requires_grad))

    def give(module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        x, weights = (  # every process has a part of their gradients
            DTensor.from_local(each, mesh, [Replicate()]).to_local(grad_placements=[Partial()]) for each in inputs[:2]
        )
        return x, weights, inputs[2]

    def add_up(module: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
        return DTensor.from_local(output, mesh, [Partial()]).redistribute(placements=[Replicate()]).to_local()

    whole = experts.matrices
    setattr(experts, "matrices", lambda: tuple(cast(DTensor, weight).to_local() for weight in whole()))  # noqa: B010
    distribute_module(experts, mesh, split, give, add_up)


def checkpoint_layer(layer: nn.Module) -> None:
    """Apply activation checkpointing to a layer, in place."""
    from torch.utils.checkpoint import checkpoint

    forward = layer.forward
    layer.forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)


def _compile_layer(layer: nn.Module) -> None:
    """Compile the parts that do not depend on the packing."""
    for name in ("attention_norm", "mlp_norm", "mlp"):
        part = layer.get_submodule(name)
        part.forward = torch.compile(part.forward, dynamic=True)


def _attend_plainly(encoder: nn.Module) -> None:
    """Use float32 matrix products for attention in an encoder trained on a CPU in 16 bit.

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
    """Make the backward pass go through every layer of a frozen model, even for a batch without images.

    All processes gather weights in the backward pass; a process whose text needs no gradient would not take part.
    """
    if torch.is_grad_enabled():
        output.requires_grad_(True)


def _attend_in_blocks(llm: LlamaModel) -> None:
    """Use block-wise attention if the recipe does not choose: torch's backward pass is slow on a CPU in bfloat16."""
    if llm.attention == "auto":
        from sphinxkit.acceleration import BlockedAttention

        llm.attention_backend = BlockedAttention()


def parallelize(root: nn.Module, llm: LlamaModel, dims: ParallelDims, plan: TrainPlan) -> None:
    """Shard matrices and weights over the processes and prepare the layers, in place.

    Frozen parameters outside the language model (encoders) are replicated, so a process without images never waits for
    one with images.

    Args:
        root: Module whose ``forward`` is the training loss; contains ``llm``.
        llm: May be on the meta device.
        dims: Rank, mesh and process groups.
        plan: Sets checkpointing, compilation and dtype.
    """
    if dims.mesh is not None and dims.tp_size > 1:
        from torch.distributed.tensor.parallel import parallelize_module

        parallelize_module(llm, dims.mesh["tp"], _tensor_plan(llm))
        for module in llm.modules():
            if isinstance(module, Experts):
                _split_experts(module, dims.mesh["tp"])
        llm.tie_weights()
    for layer in llm.layers:
        if plan.compile:
            _compile_layer(layer)
        if plan.activation_checkpointing:
            checkpoint_layer(layer)
    if dims.device.type == "cpu" and plan.dtype == "bfloat16":
        _attend_in_blocks(llm)
        for encoder in root.modules():
            if isinstance(encoder, Encoder) and encoder.trainable:
                _attend_plainly(encoder)
    if dims.mesh is None:
        return
    if not llm.embed_tokens.weight.requires_grad:
        llm.embed_tokens.register_forward_hook(_need_gradient)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=DTYPES[plan.dtype], reduce_dtype=torch.float32, cast_forward_inputs=False)
    inside = {id(parameter) for parameter in llm.parameters()}
    ignored = {p for p in root.parameters() if not p.requires_grad and id(p) not in inside}
    mesh = dims.fsdp_mesh
    for layer in llm.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh, mp_policy=policy, ignored_params=ignored)


def materialize(root: nn.Module, device: torch.device) -> None:
    """Allocate memory for tensors that are still on the meta device.

    Args:
        root: Changed in place; new tensors are uninitialised.
        device: Device of the new tensors.
    """
    root._apply(  # type: ignore[no-untyped-call]
        lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor
    )
