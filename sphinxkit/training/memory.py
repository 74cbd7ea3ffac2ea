"""Predicts the memory of each process of a training run, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphinxkit.errors import DataError
from sphinxkit.recipe import build
from sphinxkit.recipe.memory import PeakTracker, experts_of
from sphinxkit.sphinx_model import SphinxModel
from sphinxkit.training.optim import hidden_matrices
from sphinxkit.training.parallel import DTYPES, check_tensor_parallel, mesh_sizes
from sphinxkit.training.plan import TrainPlan
from sphinxkit.training.sharding import checkpoint_layer
from sphinxkit.training.trainable_model import choose_trained, find_recipe

_MASTER = 4  # bytes of a float32 weight; its gradient takes as much, each of the optimiser's moments too


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Memory of one process in bytes, by purpose.

    Args:
        weights: The process's shard of the trained weights in float32 and of the language model's frozen ones in
            ``dtype``, and all encoders in ``dtype``.
        gradients: The process's shard.
        optimizer: The process's shard of the moments: two for AdamW, one for Muon.
        gathered: Unsharded weights and gradients of the running layers in ``dtype``, and one layer's gradients in
            float32 before they are reduced. 0 without sharding.
        activations: Peak of a forward and backward pass of one packed row, without weights.
        row_tokens: Tokens of that row.
        row_images: Images of that row.
        experts: How much of weights, gradients and optimizer belongs to experts.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    row_tokens: int
    row_images: int
    experts: int

    @property
    def total(self) -> int:
        """Sum of all purposes."""
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations


def estimate_training(
    plan: TrainPlan, *, processes: int = 1, text_tokens: int = 128, folder: Path | None = None
) -> TrainingMemory:
    """Predict the memory of each process of a run. No weights are allocated and nothing is computed.

    Activations are found by tracing the real model, forward and backward, on tensors without memory, for full rows of
    samples with one image each. Tensor parallelism is assumed to shard weights but not activations, so the estimate is
    then an upper bound. Allocator overhead is not included.

    Args:
        plan: The training plan.
        processes: Number of processes that torchrun starts.
        text_tokens: Text tokens of a sample; it determines the number of images per row.
        folder: Base folder of the model recipe's path.
    Raises:
        RecipeError: The model's recipe is not valid, or has none of the trained parts.
        TrainingError: The sizes do not fit the processes.
        DataError: A count is out of range.
    """
    if processes < 1 or text_tokens < 1:
        raise DataError(f"memory: expected processes and text tokens of at least 1, got {processes}, {text_tokens}")
    model = build(find_recipe(plan, folder), device="meta", dtype=torch.float32)
    _, shard, tp = mesh_sizes(plan, processes)
    llm = model.llm
    check_tensor_parallel(plan, llm.num_heads, llm.num_kv_heads)
    dtype = DTYPES[plan.dtype]
    is_sharded = processes > 1 or plan.dtype != "float32"
    trained = {id(p) for group in choose_trained(model, plan).values() for p in group}
    inside = {id(p) for p in model.llm.parameters()}
    by_muon = {id(p) for p in hidden_matrices(model.llm)} if plan.optimizer == "muon" else set()
    by_experts = {id(p) for p in experts_of(model.llm)}
    weights = learnt = moments = experts = 0
    for parameter in model.parameters():
        share = shard * (tp if id(parameter) in inside else 1)
        count = -(-parameter.numel() // share)
        if id(parameter) in trained:
            kept = 1 if id(parameter) in by_muon else 2
            learnt += count
            moments += count * kept
            weights += count * _MASTER
            held = count * _MASTER * (2 + kept)
        else:  # encoders are whole in every process
            held = (count if id(parameter) in inside else parameter.numel()) * dtype.itemsize
            weights += held
        experts += held if id(parameter) in by_experts else 0
    slots = 0 if model.vision is None else model.vision.num_tokens
    sample = slots + text_tokens
    tokens = max(plan.pack_tokens, sample) if plan.packing else plan.micro_batch_size * sample
    images = 0 if model.vision is None else max(1, tokens // sample)
    return TrainingMemory(
        weights=weights,
        gradients=learnt * _MASTER,
        optimizer=moments * _MASTER,
        gathered=_gathered_bytes(model, trained, dtype, tp) if is_sharded else 0,
        activations=_activation_bytes(model, plan, dtype, tokens, images, tokens - images * slots),
        row_tokens=tokens,
        row_images=images,
        experts=experts,
    )


def _gathered_bytes(model: SphinxModel, trained: set[int], dtype: torch.dtype, tp: int) -> int:
    """The root's weights stay unsharded from forward to backward; two layers are unsharded, one of them prefetched."""
    layer = list(model.llm.layers[0].parameters())
    apart = {id(p) for block in model.llm.layers for p in block.parameters()}
    shared = {id(p) for p in model.llm.parameters()} | trained
    root = [p for p in model.parameters() if id(p) in shared - apart]
    whole = sum(p.numel() for p in root) + 2 * sum(p.numel() for p in layer)
    learnt = max(sum(p.numel() for p in group if id(p) in trained) for group in (layer, root))
    return (whole * dtype.itemsize + learnt * (dtype.itemsize + _MASTER)) // tp


def _activation_bytes(
    model: SphinxModel, plan: TrainPlan, dtype: torch.dtype, tokens: int, images: int, learnt: int
) -> int:
    """Peak of a row's passes; weight gradients are freed as soon as they are computed."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    llm = model.llm
    if plan.activation_checkpointing:
        for layer in llm.layers:
            checkpoint_layer(layer)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in (model, *model.modules()):
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    fake = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), parameter.requires_grad)
                    if fake.requires_grad:
                        fake.register_post_accumulate_grad_hook(_forget)  # type: ignore[no-untyped-call]
                    module._parameters[name] = fake
        with PeakTracker() as tracker:
            visual = None  # lives, with what it keeps for its own backward pass, until the language model's is over
            if model.vision is not None:
                size = model.vision.image_size
                visual = model.vision(torch.empty(images, 3, size, size))
            embeds = torch.empty(1, tokens, llm.embed_dim, dtype=dtype, requires_grad=True)
            # samples as long as can be: the memory of attention grows with the tokens, not with how they are cut
            full, rest = divmod(tokens, llm.max_seq_len)
            hidden = llm.hidden_states(embeds, seq_lens=[llm.max_seq_len] * full + [rest] * (rest > 0))
            logits = llm.lm_head(hidden[0, tokens - learnt :])
            loss = F.cross_entropy(logits.float(), torch.zeros(learnt, dtype=torch.long), reduction="sum")
            del logits, hidden
            loss.backward()  # type: ignore[no-untyped-call]
            del visual
    peak: int = tracker.peak
    return peak


def _forget(parameter: Tensor) -> None:
    parameter.grad = None
