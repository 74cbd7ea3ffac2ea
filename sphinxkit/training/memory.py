"""How much memory each process of a training run will take, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphinxkit.errors import DataError
from sphinxkit.recipe import build
from sphinxkit.recipe.memory import PeakTracker
from sphinxkit.sphinx_model import SphinxModel
from sphinxkit.training.optim import hidden_matrices
from sphinxkit.training.parallel import DTYPES, check_heads, mesh_sizes
from sphinxkit.training.plan import TrainPlan
from sphinxkit.training.sharding import checkpoint_layer
from sphinxkit.training.trainable_model import choose_trained, find_recipe

_MASTER = 4  # bytes of a float32 weight; its gradient takes as much, each of the optimiser's moments too


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Bytes that one process takes, by purpose.

    Args:
        weights: Its part of the float32 weights, and the encoders, of which every process has all.
        gradients: Its part.
        optimizer: Its part of the moments: two of AdamW's, one of Muon's.
        gathered: Weights and gradients that are whole while a layer computes, in ``dtype``, and one layer's gradients
            in float32 on their way to their parts. 0 where nothing is sharded.
        activations: The most that a forward and backward pass of one packed row hold beside the weights.
        row_tokens: Of that row.
        row_images: In that row.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    row_tokens: int
    row_images: int

    @property
    def total(self) -> int:
        """Everything at once."""
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations


def estimate_training(
    plan: TrainPlan, *, processes: int = 1, text_tokens: int = 128, folder: Path | None = None
) -> TrainingMemory:
    """Predict what a run takes in each of its processes. Nothing is computed, and no weights are made.

    The activations are found by following every operator of the real model, forward and backward, on tensors without
    memory. They are those of full rows of samples with an image each. Tensor parallelism is taken to share weights, not
    activations, so that with it the estimate is an upper bound. What an allocator adds is not in it.

    Args:
        plan: The run.
        processes: That torchrun starts.
        text_tokens: Of a sample, beside its image; how many images a row has depends on it.
        folder: That the path of the model's recipe may be relative to.
    Raises:
        RecipeError: The model's recipe is not valid, or has none of the parts to be trained.
        TrainingError: The sizes do not fit the processes.
        DataError: A count is out of range.
    """
    if processes < 1 or text_tokens < 1:
        raise DataError(f"memory: expected processes and text tokens of at least 1, got {processes}, {text_tokens}")
    model = build(find_recipe(plan, folder), device="meta", dtype=torch.float32)
    _, shard, tp = mesh_sizes(plan, processes)
    check_heads(plan, model.llm.num_heads, model.llm.num_kv_heads)
    dtype = DTYPES[plan.dtype]
    is_sharded = processes > 1 or plan.dtype != "float32"
    trained = {id(p) for group in choose_trained(model, plan).values() for p in group}
    inside = {id(p) for p in model.llm.parameters()}
    by_muon = {id(p) for p in hidden_matrices(model.llm)} if plan.optimizer == "muon" else set()
    weights = learnt = moments = 0
    for parameter in model.parameters():
        share = shard * (tp if id(parameter) in inside else 1)
        count = -(-parameter.numel() // share)
        if id(parameter) in trained:
            learnt += count
            moments += count * (1 if id(parameter) in by_muon else 2)
        is_whole = id(parameter) not in trained | inside
        weights += parameter.numel() * dtype.itemsize if is_whole else count * _MASTER
    slots = 0 if model.vision is None else model.vision.num_tokens
    tokens = plan.pack_tokens if plan.packing else plan.micro_batch_size * (slots + text_tokens)
    images = 0 if model.vision is None else max(1, tokens // (slots + text_tokens))
    return TrainingMemory(
        weights=weights,
        gradients=learnt * _MASTER,
        optimizer=moments * _MASTER,
        gathered=_gathered_bytes(model, trained, dtype, tp) if is_sharded else 0,
        activations=_activation_bytes(model, plan, dtype, tokens, images, tokens - images * slots),
        row_tokens=tokens,
        row_images=images,
    )


def _gathered_bytes(model: SphinxModel, trained: set[int], dtype: torch.dtype, tp: int) -> int:
    """The root's weights are whole from the forward to the backward pass; two layers' are, one of them coming in."""
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
    """The peak of a row's passes; the gradients of weights go as soon as they are there."""
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
