"""Low-rank updates of linear layers: trained beside a frozen matrix, and merged into it for export."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphinxkit.errors import RecipeError
from sphinxkit.training.plan import LoraPlan

_DOWN, _UP = "lora_down", "lora_up"


class LoraLinear(nn.Module):
    """A frozen linear layer plus ``scale * up(down(x))``; at first that is 0.

    Args:
        linear: The layer; its weight and bias keep their names and are frozen.
        rank: R.
        alpha: The scale is ``alpha / rank``.
    Shape:
        x: (..., in)
        return: (..., out)
        lora_down: (R, in)
        lora_up: (out, R)
    Source: LoRA, arXiv:2106.09685, section 4.1.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.requires_grad_(False)
        self.scale = alpha / rank
        self.lora_down = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.lora_up = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw ``lora_down`` as torch draws linear layers (our choice) and set ``lora_up`` to 0."""
        bound = 1 / math.sqrt(self.lora_down.shape[1])
        nn.init.uniform_(self.lora_down, -bound, bound, generator=generator)
        nn.init.zeros_(self.lora_up)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to ``x`` (..., in)."""
        return F.linear(x, self.weight, self.bias) + self.scale * F.linear(F.linear(x, self.lora_down), self.lora_up)


def add_lora(module: nn.Module, plan: LoraPlan) -> list[nn.Parameter]:
    """Replace the targeted linear layers below ``module``.

    Args:
        module: Changed in place; everything in it is frozen.
        plan: Rank, scale and targets.
    Returns:
        The new parameters.
    Raises:
        RecipeError: A target names no linear layer.
    """
    module.requires_grad_(False)
    found = set()
    added = []
    for name, child in list(module.named_modules()):
        leaf = name.rpartition(".")[2]
        if leaf in plan.targets and isinstance(child, nn.Linear):
            layer = LoraLinear(child, plan.rank, plan.alpha)
            layer.init_weights()
            module.set_submodule(name, layer)
            added += [layer.lora_down, layer.lora_up]
            found.add(leaf)
    missing = [target for target in plan.targets if target not in found]
    if missing:
        raise RecipeError(f"lora.targets: no linear layer is called {' or '.join(missing)}")
    return added


def merge_lora(tensors: Mapping[str, Tensor], plan: LoraPlan) -> dict[str, Tensor]:
    """A state dict with every update added to its matrix, under the names that it had before.

    Args:
        tensors: Whole tensors by name.
        plan: Whose scale it is.
    """
    merged = dict(tensors)
    for name in tensors:
        path, _, leaf = name.rpartition(".")
        if leaf != _DOWN:
            continue
        down, up = merged.pop(name), merged.pop(f"{path}.{_UP}")
        weight = merged[f"{path}.weight"]
        update = (plan.alpha / plan.rank) * (up.float() @ down.float())
        merged[f"{path}.weight"] = (weight.float() + update).to(weight.dtype)
    return merged
