"""LoRA: low-rank updates of frozen linear layers, merged into them for export."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphinxkit.data.permutation import derive_key
from sphinxkit.errors import CheckpointError, RecipeError
from sphinxkit.tensor_files.low_rank import Update, add_update, lora_scale
from sphinxkit.training.plan import LoraPlan

_DOWN, _UP = "lora_down", "lora_up"


def is_factor(name: str) -> bool:
    """Whether a parameter is a LoRA factor.

    Args:
        name: With or without its path.
    """
    return name.rpartition(".")[2] in (_DOWN, _UP)


class LoraLinear(nn.Module):
    """A frozen linear layer plus ``scale * up(down(x))``.

    The factors are uninitialised until ``draw_factors`` or ``init_weights`` is called; then the update is 0.

    Args:
        linear: The layer to wrap. Its weight and bias keep their names and are frozen.
        rank: Rank R of the update.
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
        self.scale = lora_scale(rank, alpha)
        self.lora_down = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.lora_up = nn.Parameter(linear.weight.new_empty(linear.out_features, rank))

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise ``lora_down`` as torch initialises linear layers (our choice) and ``lora_up`` to 0."""
        with torch.no_grad():
            for parameter, value in zip((self.lora_down, self.lora_up), self._initial(generator), strict=True):
                parameter.copy_(value)

    def _initial(self, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Full factors on the CPU, for any device and sharding of the layer."""
        bound = 1 / math.sqrt(self.lora_down.shape[1])
        down = torch.empty(self.lora_down.shape).uniform_(-bound, bound, generator=generator)
        return down, torch.zeros(self.lora_up.shape)

    def _taken(self, update: Update | None, name: str) -> tuple[Tensor, Tensor]:
        """Factors of an adapter, which must be of this layer's rank and scale."""
        ours = (tuple(self.lora_up.shape), tuple(self.lora_down.shape), self.scale)
        theirs = None if update is None else (update.up.shape, update.down.shape, update.scale)
        if update is None or theirs != ours:
            raise CheckpointError(
                f"lora.init_from: {name}: the adapter has {theirs}, the plan {ours} (shapes of B and A, scale)"
            )
        return update.down.read().float(), update.up.read().float()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer and its update. Shape: as the class."""
        return F.linear(x, self.weight, self.bias) + self.scale * F.linear(F.linear(x, self.lora_down), self.lora_up)


def add_lora(module: nn.Module, plan: LoraPlan) -> None:
    """Replace the targeted linear layers below ``module``; their factors are not initialised yet.

    Args:
        module: Changed in place; everything except the factors is frozen.
        plan: Rank, scale and targets.
    Raises:
        RecipeError: A target matches no linear layer.
    """
    module.requires_grad_(False)
    found = set()
    for name, child in list(module.named_modules()):
        leaf = name.rpartition(".")[2]
        if isinstance(child, nn.Linear):
            found.add(leaf)
            if leaf in plan.targets:
                module.set_submodule(name, LoraLinear(child, plan.rank, plan.alpha))
    missing = [target for target in plan.targets if target not in found]
    if missing:
        hint = " (the experts' matrices take no LoRA)" if getattr(module, "moe", None) is not None else ""
        known = ", ".join(sorted(found))
        raise RecipeError(f"lora.targets: no linear layer is called {' or '.join(missing)}{hint}; known: {known}")


def initial_factors(
    module: nn.Module, seed: int, given: Mapping[str, Update] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and full initial value of every factor below ``module``, equal in every process.

    Args:
        module: Has LoRA layers; sharded or not, on any device.
        seed: Random seed; combined with each layer's name.
        given: Updates to take the factors from, by the weight's name in ``module``; None draws them.
    Raises:
        CheckpointError: ``given`` has other layers, ranks or scales.
    """
    left = dict(given or {})
    for name, layer in module.named_modules():
        if isinstance(layer, LoraLinear):
            if given is None:
                generator = torch.Generator().manual_seed(derive_key(seed, name) % 2**63)
                down, up = layer._initial(generator)
            else:
                down, up = layer._taken(left.pop(f"{name}.weight", None), name)
            yield f"{name}.{_DOWN}", down
            yield f"{name}.{_UP}", up
    if left:
        raise CheckpointError(f"lora.init_from: updates {', '.join(sorted(left))}, which lora.targets leaves out")


def draw_factors(module: nn.Module, seed: int, given: Mapping[str, Update] | None = None) -> None:
    """Initialise every factor below ``module``.

    Args:
        module: Not sharded, not on the meta device.
        seed: See ``initial_factors``.
        given: See ``initial_factors``.
    Raises:
        CheckpointError: See ``initial_factors``.
    """
    with torch.no_grad():
        for name, value in initial_factors(module, seed, given):
            module.get_parameter(name).copy_(value)


def factors_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors in a state dict, by the name of the weight that they update.

    Args:
        tensors: Whole tensors by name.
    Shape:
        tensors: each as in ``LoraLinear``
        return: (R, in) and (out, R) each
    """
    paths = [name.removesuffix(f".{_DOWN}") for name in tensors if name.endswith(f".{_DOWN}")]
    return {f"{path}.weight": (tensors[f"{path}.{_DOWN}"], tensors[f"{path}.{_UP}"]) for path in paths}


def merge_lora(tensors: Mapping[str, Tensor], plan: LoraPlan) -> dict[str, Tensor]:
    """Merge every update into its matrix; returns a state dict with the original names.

    Args:
        tensors: Whole tensors by name.
        plan: Holds the scale.
    Shape:
        tensors: each as in ``LoraLinear``
    """
    factors = factors_of(tensors)
    merged = {name: tensor for name, tensor in tensors.items() if not is_factor(name)}
    for name, (down, up) in factors.items():
        merged[name] = add_update(merged[name], down, up, lora_scale(plan.rank, plan.alpha))
    return merged
