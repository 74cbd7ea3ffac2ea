from __future__ import annotations

import math

import pytest
import torch

from sphinxkit.encoders.layers import activation_layer, attend
from sphinxkit.errors import RegistryError

# float64 against float64 in another order of operations.
EXACT_ATOL = 1e-12


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("gelu", lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2)))),
        ("gelu_tanh", lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
        ("quick_gelu", lambda x: x / (1 + math.exp(-1.702 * x))),
        ("silu", lambda x: x / (1 + math.exp(-x))),
    ],
)
def test_activations_are_their_formulas(name: str, formula: object) -> None:
    values = [-3.0, -0.7, 0.0, 0.4, 2.5]
    got = activation_layer(name, "here")()(torch.tensor(values, dtype=torch.float64))
    expected = torch.tensor([formula(value) for value in values], dtype=torch.float64)  # type: ignore[operator]
    torch.testing.assert_close(got, expected, rtol=0, atol=EXACT_ATOL)


def test_unknown_activation_names_the_known_ones() -> None:
    with pytest.raises(RegistryError, match=r"here: unknown activation 'gellu' \(known: gelu, .*did you mean 'gelu'"):
        activation_layer("gellu", "here")


def test_attend_is_softmax_attention_per_head() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n, 6, dtype=torch.float64, generator=generator) for n in (3, 5, 5))
    heads = []
    for head in range(2):
        columns = slice(3 * head, 3 * head + 3)
        scores = query[..., columns] @ key[..., columns].transpose(1, 2) / math.sqrt(3)
        heads.append(scores.softmax(-1) @ value[..., columns])
    expected = torch.cat(heads, dim=-1)
    torch.testing.assert_close(attend(query, key, value, 2), expected, rtol=0, atol=EXACT_ATOL)
