"""Projectors: vision tokens of any width to the language model's width."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, cast

from torch import Tensor, nn

from sphinxkit.errors import RegistryError, ShapeError
from sphinxkit.registry import Registry, suggest

__all__ = ["LinearProjector", "MLPProjector", "create", "names", "register", "registry"]

ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu")


class LinearProjector(nn.Module):
    """One linear layer, then a LayerNorm (optional).

    Args:
        in_dim: Width of the vision tokens.
        out_dim: Width of the language model.
        norm: "layer" for a LayerNorm over ``out_dim``, None for none.
        norm_eps: Its epsilon; 1e-5 is torch's default, which SPHINX keeps.
    Shape:
        tokens: (B, N, in_dim)
        return: (B, N, out_dim)
    Raises:
        ShapeError: A width is no positive int, or tokens have another width.
        RegistryError: Unknown ``norm``.
    Source: LLaMA2-Accessory, accessory/model/LLM/llama_ens5.py, visual_proj and qformer_proj.
    """

    def __init__(
        self, in_dim: int, out_dim: int, norm: Literal["layer"] | None = "layer", norm_eps: float = 1e-5
    ) -> None:
        super().__init__()
        _check_dims("linear projector", in_dim=in_dim, out_dim=out_dim)
        self.in_dim = in_dim
        self.out_dim = out_dim
        self.proj = nn.Linear(in_dim, out_dim)
        self.norm = _make_norm("linear projector", norm, out_dim, norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        """Project the tokens. Shape: as the class.

        Raises:
            ShapeError: Tokens of another width.
        """
        _check_tokens("linear projector", tokens, self.in_dim)
        return cast("Tensor", self.norm(self.proj(tokens)))


class MLPProjector(nn.Module):
    """``num_layers`` linear layers with an activation between them.

    Args:
        in_dim: Width of the vision tokens.
        out_dim: Width of the language model.
        hidden_dim: Width between the layers; None: ``out_dim``.
        num_layers: Linear layers, at least 1.
        activation: "gelu" (erf), "gelu_tanh", "silu" or "relu".
        norm: "layer" for a LayerNorm over the output, None for none.
        norm_eps: Its epsilon.
    Shape:
        tokens: (B, N, in_dim)
        return: (B, N, out_dim)
    Raises:
        ShapeError: A width or ``num_layers`` is no positive int, or tokens have another width.
        RegistryError: Unknown ``norm`` or ``activation``.
    Source: the two-layer GELU projector of LLaVA-1.5, arXiv:2310.03744, section 3.3.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden_dim: int | None = None,
        num_layers: int = 2,
        activation: Literal["gelu", "gelu_tanh", "silu", "relu"] = "gelu",
        norm: Literal["layer"] | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        hidden_dim = out_dim if hidden_dim is None else hidden_dim
        _check_dims("mlp projector", in_dim=in_dim, out_dim=out_dim, hidden_dim=hidden_dim, num_layers=num_layers)
        self.in_dim = in_dim
        self.out_dim = out_dim
        widths = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.activation = _make_activation(activation)
        self.norm = _make_norm("mlp projector", norm, out_dim, norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        """Project the tokens. Shape: as the class.

        Raises:
            ShapeError: Tokens of another width.
        """
        _check_tokens("mlp projector", tokens, self.in_dim)
        for index, layer in enumerate(self.layers):
            tokens = layer(tokens if index == 0 else self.activation(tokens))
        return cast("Tensor", self.norm(tokens))


def _check_dims(where: str, **dims: int) -> None:
    for name, value in dims.items():
        if not isinstance(value, int) or value < 1:
            raise ShapeError(f"{where}: {name} must be an int of at least 1, got {value!r}")


def _check_tokens(where: str, tokens: Tensor, in_dim: int) -> None:
    if tokens.ndim < 1 or tokens.shape[-1] != in_dim:
        raise ShapeError(f"{where}: expected tokens of width {in_dim}, got shape {tuple(tokens.shape)}")


def _make_norm(where: str, norm: str | None, dim: int, eps: float) -> nn.Module:
    if norm is None:
        return nn.Identity()
    if norm != "layer":
        raise RegistryError(f"{where}: unknown norm {norm!r}; known: 'layer' and None")
    return nn.LayerNorm(dim, eps=eps)


def _make_activation(activation: str) -> nn.Module:
    if activation == "gelu":
        return nn.GELU()
    if activation == "gelu_tanh":
        return nn.GELU(approximate="tanh")
    if activation == "silu":
        return nn.SiLU()
    if activation == "relu":
        return nn.ReLU()
    raise RegistryError(
        f"mlp projector: unknown activation {activation!r}{suggest(activation, ACTIVATIONS) or '.'} "
        f"Known: {', '.join(ACTIVATIONS)}"
    )


registry: Registry[nn.Module] = Registry("projector", {"linear": LinearProjector, "mlp": MLPProjector})
register = registry.register
create = registry.build
names = registry.names
