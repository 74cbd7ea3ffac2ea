"""Muon (orthogonalised momentum) for hidden matrices, AdamW for all other parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from sphinxkit.training.errors import TrainingError

MOMENTUM = 0.95  # Source: Keller Jordan, Muon, 2024
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of x, x^3 and x^5. Source: as above
NEWTON_SCHULZ_STEPS = 5  # Source: as above
RMS = 0.2  # of an update at a learning rate of 1, about AdamW's. Source: Moonlight, arXiv:2502.16982, section 2.2


def orthogonalize(matrices: Tensor) -> Tensor:
    """Approximately orthogonalise matrices: singular values end between 0.7 and 1.2.

    Args:
        matrices: Batch of matrices; a zero matrix is unchanged.
    Shape:
        matrices: (N, A, B)
        return: (N, A, B) bfloat16
    Source: Keller Jordan, Muon, 2024; Bernstein and Newhouse, arXiv:2409.20325, appendix A.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)).bfloat16()
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def _local(tensor: Tensor) -> Tensor:
    """The local shard of a tensor, or all of it if unsharded; in-place changes reach the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _is_cut(parameter: Tensor) -> bool:
    """Whether a process has only a part of a matrix."""
    if not isinstance(parameter, DTensor) or parameter.device_mesh.size() == 1:
        return False
    axes = {getattr(placement, "dim", None) for placement in parameter.placements}
    return bool(axes & {parameter.ndim - 1, parameter.ndim - 2})


def _own_part(moved: Tensor, parameter: DTensor) -> Tensor:
    """``orthogonalize`` a sharded parameter: every process gathers it and keeps its shard of the result."""
    mesh, placements = parameter.device_mesh, parameter.placements
    shape, stride = parameter.shape, parameter.stride()
    matrix = DTensor.from_local(moved, mesh, placements, run_check=False, shape=shape, stride=stride).full_tensor()
    update = orthogonalize(matrix.view(-1, *shape[-2:])).reshape(shape)
    return distribute_tensor(update, mesh, placements, src_data_rank=None).to_local()


class MuonAdamW(torch.optim.AdamW):
    """AdamW, with Muon for the groups that have ``muon: True``; those may hold matrices only.

    A parameter may be several matrices of one shape (the experts of a layer), each of which is updated by itself.
    Muon's updates are scaled to AdamW's size, so both use the same learning rate. For a sharded matrix, every process
    gathers it, computes the full update and keeps its shard.

    Args:
        groups: Parameter groups, each with ``muon``.
        options: Options of AdamW.
    Raises:
        TrainingError: A Muon group has parameters that are not matrices.
    Source: Keller Jordan, Muon, 2024; Moonlight, arXiv:2502.16982.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], **options: Any) -> None:
        for parameter in (p for group in groups if group["muon"] for p in group["params"]):
            if parameter.ndim not in (2, 3):
                raise TrainingError(f"muon: expected matrices, got a parameter of shape {tuple(parameter.shape)}")
        super().__init__(list(groups), **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: Not used.
        """
        groups = self.param_groups
        for group in groups:
            if group["muon"]:
                self._step_muon(group)
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            super().step()
        finally:
            self.param_groups = groups

    def _step_muon(self, group: dict[str, Any]) -> None:
        alike: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                alike.setdefault(parameter.shape, []).append((parameter, parameter.grad))
        for shape, pairs in alike.items():
            moved = []
            for parameter, gradient in pairs:
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())  # AdamW asks for it when a state is loaded
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                state["step"] += 1
                grad, momentum = _local(gradient), _local(state["momentum_buffer"])
                moved.append(grad.lerp(momentum.lerp_(grad, 1 - MOMENTUM), MOMENTUM))  # Nesterov's
            updates: Iterable[Tensor]
            if _is_cut(pairs[0][0]):
                updates = (_own_part(part, cast(DTensor, p)) for part, (p, _) in zip(moved, pairs, strict=True))
            else:
                updates = map(orthogonalize, moved) if len(shape) == 3 else orthogonalize(torch.stack(moved))
            size = RMS * max(shape[-2:]) ** 0.5
            for (parameter, _), update in zip(pairs, updates, strict=True):
                weight = _local(parameter)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(update.to(weight.dtype) * (group["lr"] * size))
