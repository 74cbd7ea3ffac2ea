"""Optimiser, schedule and clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sphinxkit.llama import LlamaModel
from sphinxkit.training.muon import MuonAdamW
from sphinxkit.training.plan import TrainPlan


def learning_rate(step: int, num_steps: int, peak: float, *, warmup_ratio: float = 0.03, minimum: float = 0.0) -> float:
    """Learning rate of a step: linear warm-up, then cosine decay to ``minimum``.

    It is a pure function, so a resumed run needs no scheduler state.

    Args:
        step: Step number from 0.
        num_steps: Number of steps of the whole run.
        peak: Peak learning rate, reached at the last warm-up step.
        warmup_ratio: Fraction of warm-up steps, rounded up to whole steps.
        minimum: Final learning rate of the decay.
    Source: SGDR, arXiv:1608.03983, equation 5, one period, with warm-up.
    """
    rising = math.ceil(warmup_ratio * num_steps)
    if step < rising:
        return peak * (step + 1) / rising
    progress = (step - rising) / max(1, num_steps - rising)
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def hidden_matrices(llm: LlamaModel) -> list[nn.Parameter]:
    """The matrices of a language model's layers, experts too: all but its embedding and its output."""
    return [parameter for parameter in llm.layers.parameters() if parameter.ndim > 1]


def make_optimizer(
    parts: Mapping[str, Sequence[nn.Parameter]], plan: TrainPlan, matrices: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """Make the plan's optimiser for the trained parts. Weight decay applies to matrices, not to vectors.

    Args:
        parts: Trained parameters by part.
        plan: Optimiser, betas, eps, weight decay and each part's factor on the learning rate (kept in the group's
            ``lr_scale``).
        matrices: Parameters for Muon, if the plan uses it; AdamW takes the rest.
    Raises:
        TrainingError: The plan uses Muon and the matrices are split by tensor parallelism.
    """
    is_muon = plan.optimizer == "muon"
    chosen_ids = {id(parameter) for parameter in matrices} if is_muon else set()
    groups = []
    for part, parameters in parts.items():
        inside = [p for p in parameters if id(p) in chosen_ids]
        outside = [p for p in parameters if id(p) not in chosen_ids]
        for chosen, decay, muon in (
            (inside, plan.weight_decay, True),
            ([p for p in outside if p.ndim > 1], plan.weight_decay, False),
            ([p for p in outside if p.ndim <= 1], 0.0, False),
        ):
            if chosen:
                scale = plan.lr_scale.get(part, 1.0)
                groups.append({"params": chosen, "weight_decay": decay, "lr_scale": scale, "muon": muon})
    kind = MuonAdamW if is_muon else torch.optim.AdamW
    return kind(groups, lr=plan.lr, betas=plan.betas, eps=plan.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group.

    Args:
        optimizer: From ``make_optimizer``.
        rate: Learning rate before the groups' factors.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Euclidean norm of all gradients together, in float32; the same on every process.

    Sharded gradients are summed over their processes; replicated ones count once.

    Args:
        parameters: Parameters; those without a gradient are ignored.
    Returns:
        A scalar.
    """
    totals: dict[object, list[Tensor]] = {}
    meshes: dict[object, DTensor] = {}
    for parameter in parameters:
        grad = parameter.grad
        if grad is None:
            continue
        key: object = None
        if isinstance(grad, DTensor):
            key = (grad.device_mesh, grad.placements)
            meshes.setdefault(key, grad)
            grad = grad.to_local()
        totals.setdefault(key, []).append(torch.linalg.vector_norm(grad, dtype=torch.float32) ** 2)
    squares = []
    for key, found in totals.items():
        square = torch.stack(found).sum()
        if key in meshes:
            square = _sum_over_shards(square, meshes[key])
        squares.append(square)
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())


def _sum_over_shards(square: Tensor, like: DTensor) -> Tensor:
    import torch.distributed as dist

    for dim, placement in enumerate(like.placements):
        if not placement.is_replicate():
            dist.all_reduce(square, group=like.device_mesh.get_group(dim))
    return square


@torch.no_grad()
def scale_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, limit: float) -> None:
    """Shrink all gradients so that their norm is at most ``limit``.

    Args:
        parameters: See ``gradient_norm``.
        norm: Result of ``gradient_norm``.
        limit: Maximum norm.
    Shape:
        norm: ()
    Source: Pascanu et al., arXiv:1211.5063, algorithm 1; the 1e-6 is torch's ``clip_grad_norm_``.
    """
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            local = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            local.mul_(factor.to(local.device))
