"""Attention over heads and the activations by name, shared by the encoders."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sphinxkit.errors import RegistryError
from sphinxkit.registry import suggest


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation of GELU that OpenAI's CLIP weights were trained with.

    Source: openai/CLIP, clip/model.py, QuickGELU.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply it element by element.

        Shape:
            hidden, return: any
        """
        return hidden * torch.sigmoid(1.702 * hidden)


# Standard deviation of random weights. Source: BERT, arXiv:1810.04805 (initializer_range); ConvNeXt; DINOv2.
INIT_STD = 0.02
# "gelu" is the exact form x * Phi(x) by erf; "gelu_tanh" its tanh approximation (arXiv:1606.08415, section 2).
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "quick_gelu": QuickGELU,
    "silu": nn.SiLU,
}


def activation_layer(name: str, where: str) -> Callable[[], nn.Module]:
    """The constructor of the activation called ``name``.

    Raises:
        RegistryError: There is none; the message lists the known names.
    """
    if name not in _ACTIVATIONS:
        known = ", ".join(sorted(_ACTIVATIONS))
        raise RegistryError(f"{where}: unknown activation {name!r} (known: {known}){suggest(name, _ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def replace_activations(module: nn.Module, activation: str, where: str) -> None:
    """Put the activation called ``activation`` in the place of every one in ``module``, which has one kind only.

    Raises:
        RegistryError: There is no activation of that name.
    """
    layer = activation_layer(activation, where)
    kinds = (nn.GELU, nn.SiLU, QuickGELU)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kinds):
                setattr(parent, name, layer())


def init_weights(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """Draw the weights of all layers of some kinds from a truncated normal distribution; their biases become zero.

    Source: ConvNeXt, arXiv:2201.03545, and DINOv2, arXiv:2304.07193, published code (standard deviation 0.02).
    """
    for layer in module.modules():
        if isinstance(layer, kinds):
            nn.init.trunc_normal_(layer.weight, std=INIT_STD)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


def count_layers(names: Iterable[str], template: str) -> int:
    """Layers in a state dict.

    Args:
        names: Of its tensors.
        template: The start of a layer's names, ``{}`` for its number.
    """
    pattern = re.compile(re.escape(template).replace(r"\{\}", r"(\d+)"))
    return len({match.group(1) for name in names if (match := pattern.match(name))})


def attend(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """Scaled dot-product attention between all tokens, by torch's fused operator.

    Args:
        query: Projected queries.
        key: Projected keys.
        value: Projected values.
        num_heads: Heads that the width is split into; a head has consecutive channels.
    Shape:
        query, return: (B, N, D)
        key, value: (B, M, D)
    """
    query, key, value = (rearrange(tokens, "b n (h d) -> b h n d", h=num_heads) for tokens in (query, key, value))
    return rearrange(F.scaled_dot_product_attention(query, key, value), "b h n d -> b n (h d)")
