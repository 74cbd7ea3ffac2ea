"""Mixture of experts: a router sends every token through a few of several feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphinxkit.errors import ShapeError
from sphinxkit.registry import from_fields


@dataclass(frozen=True)
class MoEOptions:
    """The ``moe`` option of a model.

    Args:
        num_experts: Feed-forward layers in each decoder layer, E.
        num_experts_per_tok: How many of them compute each token, k.
        load_balancing_weight: Factor on the balance loss in training. 0.01 is that of ``mixtral_sparse_ens5``.
    Raises:
        ShapeError: A number is out of range.
    Source: LLaMA2-Accessory, accessory/model/LLM/mixtral_sparse_ens5.py, ModelArgs.
    """

    num_experts: int
    num_experts_per_tok: int
    load_balancing_weight: float = 0.01

    def __post_init__(self) -> None:
        for name in ("num_experts", "num_experts_per_tok"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ShapeError(f"moe: {name} must be a whole number of at least 1, got {value!r}")
        if self.num_experts_per_tok > self.num_experts:
            raise ShapeError(
                f"moe: num_experts_per_tok {self.num_experts_per_tok} is more than num_experts {self.num_experts}"
            )
        weight = self.load_balancing_weight
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 <= weight < float("inf"):
            raise ShapeError(f"moe: load_balancing_weight must be a number of at least 0, got {weight!r}")


def parse_moe(value: Mapping[str, Any] | None) -> MoEOptions | None:
    """The ``moe`` option of a model, checked.

    Args:
        value: The fields of a ``MoEOptions``; None: no experts.
    Raises:
        RegistryError: A key is unknown or missing.
        ShapeError: A number is out of range.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ShapeError(f"moe: expected a mapping with num_experts and num_experts_per_tok, got {value!r}")
    return from_fields(MoEOptions, value, "moe")


class Experts(nn.Module):
    """The experts of one layer, each a ``SwiGLU`` without biases: ``down(silu(gate(x)) * up(x))``.

    The three matrices of all experts are three parameters. An expert that no token reaches has a gradient of zeros.
    ``down_proj`` is stored from hidden to model width, as the released files have it: the transpose of a Linear weight.

    Args:
        embed_dim: Width in and out, D.
        hidden_dim: Width of each expert's gate, H.
        num_experts: How many, E.
    Shape:
        gate_proj, up_proj, down_proj: (E, H, D)
    Source: Mixtral, arXiv:2401.04088, section 2.1; LLaMA2-Accessory, accessory/model/LLM/mixtral_sparse.py, MoE.
    """

    def __init__(self, embed_dim: int, hidden_dim: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_proj, self.up_proj, self.down_proj = (
            nn.Parameter(torch.empty(num_experts, hidden_dim, embed_dim)) for _ in range(3)
        )
        for weight in (self.gate_proj, self.up_proj, self.down_proj):
            nn.init.normal_(weight, std=embed_dim**-0.5)

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Weighted sum of the chosen experts' outputs.

        The rows are sorted by expert, so each expert that is chosen multiplies its own rows once.

        Args:
            x: Tokens.
            weights: Factor of each chosen expert's output, in the dtype of ``x``.
            chosen: Numbers of the experts.
        Shape:
            x: (T, D)
            weights, chosen: (T, k)
            return: (T, D)
        """
        per_token = chosen.shape[1]
        order = chosen.flatten().argsort(stable=True)
        rows = torch.split(x[order // per_token], _segments(chosen, self.num_experts))
        outputs = torch.cat(self.run(rows))[order.argsort()]  # in the order of (token, slot) again
        return (outputs.view(-1, per_token, x.shape[1]) * weights[..., None]).sum(1)

    def run(self, rows: tuple[Tensor, ...]) -> list[Tensor]:
        """The outputs of the experts that have rows.

        Args:
            rows: Tokens of each expert.
        Shape:
            rows: (t, D) for each expert
            return: (t, D) for each expert with t > 0
        """
        # unbind, not one index after the other: its backward pass makes one gradient for all experts
        matrices = zip(*(weight.unbind() for weight in self.matrices()), strict=True)
        return [
            (F.silu(F.linear(x, gate)) * F.linear(x, up)) @ down
            for x, (gate, up, down) in zip(rows, matrices, strict=True)
            if len(x)
        ]

    def matrices(self) -> tuple[Tensor, ...]:
        """The weights that ``run`` multiplies with.

        Shape:
            return: gate, up and down, each (E, H, D)
        """
        return self.gate_proj, self.up_proj, self.down_proj

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return ", ".join(f"{name}={list(weight.shape)}" for name, weight in self.named_parameters())


class MixtureOfExperts(nn.Module):
    """A router and its experts, in place of a decoder layer's feed-forward layer.

    Every token is routed by itself: to the k experts with the largest probability, whose outputs are weighted by their
    probabilities divided by the sum of the k. Softmax and division are float32 (float64 for a float64 model). No token
    is dropped, nothing is random.

    Args:
        embed_dim: Width in and out, D.
        hidden_dim: Width of each expert's gate.
        options: Numbers of experts.
    Shape:
        x: (..., D)
        return: (..., D)
    Source: Mixtral, arXiv:2401.04088, section 2.1; LLaMA2-Accessory, accessory/model/LLM/mixtral_sparse.py, MoE.
    """

    def __init__(self, embed_dim: int, hidden_dim: int, options: MoEOptions) -> None:
        super().__init__()
        self.num_experts_per_tok = options.num_experts_per_tok
        self.router = nn.Linear(embed_dim, options.num_experts, bias=False)
        self.experts = Experts(embed_dim, hidden_dim, options.num_experts)

    def forward(self, x: Tensor, add_balance_loss: Callable[[Tensor], None] | None = None) -> Tensor:
        """Route and compute every token. Shape: as the class.

        Args:
            x: Tokens.
            add_balance_loss: Takes this layer's balance loss.
        """
        tokens = x.reshape(-1, x.shape[-1])
        logits: Tensor = self.router(tokens)
        probabilities = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        weights, chosen = probabilities.topk(self.num_experts_per_tok, dim=-1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        if add_balance_loss is not None:
            add_balance_loss(balance_loss(probabilities, chosen))
        out: Tensor = self.experts(tokens, weights, chosen)
        return out.view(x.shape)


def balance_loss(probabilities: Tensor, chosen: Tensor) -> Tensor:
    """How unevenly the experts are used: 1 if every expert has the same share of tokens and of probability.

    ``E / (T k) * sum over experts of (tokens sent there) * (mean probability)``. The counts are constants.

    Args:
        probabilities: Of every expert, before the chosen ones are divided by their sum.
        chosen: Numbers of the experts.
    Shape:
        probabilities: (T, E)
        chosen: (T, k)
        return: scalar
    Source: Switch Transformer, arXiv:2101.03961, equation 4, with k experts a token; LLaMA2-Accessory,
        accessory/model/LLM/mixtral_sparse.py, MoE._load_balancing_loss. Transformers' own is about k times as large.
    """
    experts = probabilities.shape[1]
    counts = F.one_hot(chosen.flatten(), experts).sum(0).to(probabilities.dtype)
    return experts / chosen.numel() * torch.dot(counts, probabilities.mean(0))


def _segments(chosen: Tensor, num_experts: int) -> list[int]:
    """How many rows each expert has; where tensors only stand for memory, as even as can be."""
    if chosen.is_meta or type(chosen) is not Tensor:
        share, rest = divmod(chosen.numel(), num_experts)
        return [share + (expert < rest) for expert in range(num_experts)]
    counts: list[int] = chosen.flatten().bincount(minlength=num_experts).tolist()
    return counts
