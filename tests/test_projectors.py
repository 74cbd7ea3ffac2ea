from __future__ import annotations

import pytest
import torch

from sphinxkit import projectors
from sphinxkit.errors import RegistryError, ShapeError
from sphinxkit.projectors import LinearProjector, MLPProjector

FLOAT32 = 1e-5  # float32 sums of tens of products near 1 against float64


def test_linear_against_float64() -> None:
    torch.manual_seed(0)
    projector = LinearProjector(12, 20)
    torch.nn.init.normal_(projector.norm.weight)
    tokens = torch.randn(2, 5, 12)
    y = tokens.double() @ projector.proj.weight.double().T + projector.proj.bias.double()
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    y = y * projector.norm.weight.double() + projector.norm.bias.double()
    torch.testing.assert_close(projector(tokens).double(), y, atol=FLOAT32, rtol=0)


def test_linear_names_and_no_norm() -> None:
    assert sorted(LinearProjector(2, 3).state_dict()) == ["norm.bias", "norm.weight", "proj.bias", "proj.weight"]
    bare = LinearProjector(2, 3, norm=None)
    assert sorted(bare.state_dict()) == ["proj.bias", "proj.weight"]
    tokens = torch.randn(1, 4, 2)
    assert torch.equal(bare(tokens), bare.proj(tokens))
    assert LinearProjector(2, 3, norm_eps=1e-3).norm.eps == 1e-3


@pytest.mark.parametrize(
    ("activation", "formula"),
    [
        ("gelu", lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5))),
        ("gelu_tanh", lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))),
        ("silu", lambda x: x / (1 + torch.exp(-x))),
        ("relu", lambda x: x.clamp(min=0)),
    ],
)
def test_mlp_against_float64(activation, formula) -> None:
    torch.manual_seed(0)
    projector = MLPProjector(6, 10, hidden_dim=8, num_layers=3, activation=activation)
    tokens = torch.randn(2, 3, 6)
    y = tokens.double()
    for index, layer in enumerate(projector.layers):
        y = y if index == 0 else formula(y)
        y = y @ layer.weight.double().T + layer.bias.double()
    torch.testing.assert_close(projector(tokens).double(), y, atol=FLOAT32, rtol=0)


def test_mlp_widths_and_norm() -> None:
    widths = [tuple(layer.weight.shape) for layer in MLPProjector(6, 10).layers]
    assert widths == [(10, 6), (10, 10)]
    assert [tuple(layer.weight.shape) for layer in MLPProjector(6, 10, num_layers=1).layers] == [(10, 6)]
    normed = MLPProjector(6, 10, norm="layer")(torch.randn(1, 2, 6))
    torch.testing.assert_close(normed.mean(-1), torch.zeros(1, 2), atol=FLOAT32, rtol=0)


@pytest.mark.parametrize("kind", [LinearProjector, MLPProjector])
def test_meta_device_and_refusals(kind) -> None:
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in kind(4, 8).parameters())
    with pytest.raises(ShapeError, match=r"expected tokens of width 4, got shape \(1, 2, 5\)"):
        kind(4, 8)(torch.zeros(1, 2, 5))
    with pytest.raises(ShapeError, match="out_dim must be an int of at least 1, got 0"):
        kind(4, 0)
    with pytest.raises(RegistryError, match="unknown norm 'rms'; known: 'layer' and None"):
        kind(4, 8, norm="rms")


def test_mlp_refusals() -> None:
    with pytest.raises(RegistryError, match=r"unknown activation 'gleu'; did you mean 'gelu'\? Known: gelu, gelu_tanh"):
        MLPProjector(4, 8, activation="gleu")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="num_layers must be an int of at least 1, got 0"):
        MLPProjector(4, 8, num_layers=0)


def test_registered() -> None:
    assert isinstance(projectors.create("linear", in_dim=2, out_dim=3), LinearProjector)
    assert isinstance(projectors.create("mlp", in_dim=2, out_dim=3), MLPProjector)
    assert projectors.names() == ["linear", "mlp"]
