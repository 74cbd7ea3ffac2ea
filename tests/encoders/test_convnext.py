from __future__ import annotations

from collections.abc import Callable

import pytest
import timm as timm_library
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphinxkit.encoders import convnext_xxlarge
from sphinxkit.errors import RegistryError, ShapeError
from sphinxkit.pixels import resize_pixels

# float32 rounding through a few blocks on features of order one.
ROUNDING_ATOL = 2e-5
# What eps 1e-6 for 1e-5 costs on the low-contrast pixels below must stand well above rounding, or it is not tested.
EPS_COST = 10 * ROUNDING_ATOL
SIZES = [((8, 16, 24, 32), (1, 1, 1, 1)), ((12, 8, 16, 40), (1, 2, 3, 1))]


def formula(weights: dict[str, Tensor], pixels: Tensor, depths: tuple[int, ...], eps: float = 1e-5) -> Tensor:
    """ConvNeXt's normed last map in float64 from the paper's equations: (B, 3, S, S) -> (B, D, S/32, S/32)."""
    w = {name.removeprefix("trunk."): tensor.double() for name, tensor in weights.items()}

    def norm(hidden: Tensor, name: str) -> Tensor:  # over the channels, axis 1
        centred = hidden - hidden.mean(1, keepdim=True)
        unit = centred / (centred.square().mean(1, keepdim=True) + eps).sqrt()
        return unit * w[f"{name}.weight"].view(1, -1, 1, 1) + w[f"{name}.bias"].view(1, -1, 1, 1)

    def linear(hidden: Tensor, name: str) -> Tensor:
        return F.conv2d(hidden, w[f"{name}.weight"][:, :, None, None], w[f"{name}.bias"])

    hidden = norm(F.conv2d(pixels.double(), w["stem.0.weight"], w["stem.0.bias"], stride=4), "stem.1")
    for stage, depth in enumerate(depths):
        if stage:
            at = f"stages.{stage}.downsample"
            hidden = F.conv2d(norm(hidden, f"{at}.0"), w[f"{at}.1.weight"], w[f"{at}.1.bias"], stride=2)
        for block in range(depth):
            at = f"stages.{stage}.blocks.{block}"
            inner = F.conv2d(
                hidden, w[f"{at}.conv_dw.weight"], w[f"{at}.conv_dw.bias"], padding=3, groups=hidden.shape[1]
            )
            inner = linear(norm(inner, f"{at}.norm"), f"{at}.mlp.fc1")
            inner = linear(inner * 0.5 * (1 + torch.erf(inner / 2**0.5)), f"{at}.mlp.fc2")
            hidden = hidden + w[f"{at}.gamma"].view(1, -1, 1, 1) * inner
    return norm(hidden, "head.norm")


@pytest.mark.parametrize(("dims", "depths"), SIZES)
def test_parity_with_the_papers_formula(
    dims: tuple[int, ...],
    depths: tuple[int, ...],
    randomize: Callable[..., nn.Module],
    random_pixels: Callable[..., Tensor],
) -> None:
    encoder = randomize(convnext_xxlarge(input_size=96, dims=dims, depths=depths))
    pixels = 0.003 * random_pixels(2, 96)  # low contrast: the stem's norm then feels its eps
    weights = encoder.state_dict()
    weights["trunk.stem.0.bias"].mul_(0.003)
    expected = formula(weights, pixels, depths)
    features = encoder(pixels)
    assert features.grid == (3, 3)
    got = features.patches.transpose(1, 2).unflatten(2, (3, 3))
    torch.testing.assert_close(got, expected.float(), rtol=0, atol=ROUNDING_ATOL)
    mean = expected.mean((2, 3)).float()
    torch.testing.assert_close(features.prefix[:, 0], mean, rtol=0, atol=ROUNDING_ATOL)
    assert (formula(weights, pixels, depths, eps=1e-6) - expected).abs().max() > EPS_COST


@pytest.mark.parametrize(("dims", "depths"), SIZES)
def test_parity_with_timm(
    dims: tuple[int, ...],
    depths: tuple[int, ...],
    randomize: Callable[..., nn.Module],
    random_pixels: Callable[..., Tensor],
) -> None:
    reference = timm_library.create_model(
        "convnext_xxlarge", pretrained=False, num_classes=0, dims=dims, depths=depths, drop_path_rate=0.1
    )
    randomize(reference).eval()
    encoder = convnext_xxlarge(input_size=64, dims=dims, depths=depths)
    encoder.trunk.load_state_dict(reference.state_dict())
    pixels = random_pixels(2, 64)
    with torch.no_grad():
        expected = reference.head.norm(reference.forward_features(pixels)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder(pixels).patches, expected, rtol=0, atol=ROUNDING_ATOL)


def test_every_norm_has_the_epsilon_asked_for() -> None:
    for eps in (1e-5, 3e-4):
        encoder = convnext_xxlarge(input_size=32, dims=SIZES[0][0], depths=SIZES[0][1], norm_eps=eps)
        found = {module.eps for module in encoder.modules() if isinstance(module, nn.LayerNorm)}
        assert found == {eps}


def test_no_drop_path_even_when_trainable() -> None:
    encoder = convnext_xxlarge(input_size=32, dims=SIZES[1][0], depths=SIZES[1][1], trainable=True).train()
    pixels = torch.randn(2, 3, 32, 32)
    tokens = encoder(pixels).tokens()
    assert torch.equal(tokens, encoder(pixels).tokens())
    tokens.square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_another_view_is_taken_by_nearest_neighbour(randomize: Callable[..., nn.Module]) -> None:
    encoder = randomize(convnext_xxlarge(input_size=64, dims=SIZES[0][0], depths=SIZES[0][1]))
    pixels = torch.randn(1, 3, 56, 56)
    expected = encoder(resize_pixels(pixels, (64, 64), "nearest")).tokens()
    assert torch.equal(encoder(pixels).tokens(), expected)


@pytest.mark.parametrize("activation", ["gelu_tanh", "quick_gelu"])
def test_activation_reaches_the_network(activation: str, randomize: Callable[..., nn.Module]) -> None:
    sizes = {"input_size": 32, "dims": SIZES[0][0], "depths": SIZES[0][1]}
    exact = randomize(convnext_xxlarge(**sizes))  # type: ignore[arg-type]
    other = convnext_xxlarge(activation=activation, **sizes)  # type: ignore[arg-type]
    other.load_state_dict(exact.state_dict())
    pixels = torch.randn(1, 3, 32, 32)
    assert (exact(pixels).tokens() - other(pixels).tokens()).abs().max() > 5 * ROUNDING_ATOL


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("batch", [1, 2])
def test_any_dtype(dtype: torch.dtype, batch: int) -> None:
    encoder = convnext_xxlarge(input_size=32, dims=SIZES[0][0], depths=SIZES[0][1]).to(dtype)
    features = encoder(torch.randn(batch, 3, 32, 32))
    assert (features.tokens().dtype, features.num_tokens) == (dtype, 2)


def test_errors() -> None:
    with pytest.raises(ShapeError, match="input_size 225 is not a positive multiple of stride 32"):
        convnext_xxlarge(input_size=225)
    with pytest.raises(ShapeError, match=r"expected four dims and four depths, got dims \(8, 16\), depths \(1, 1\)"):
        convnext_xxlarge(dims=(8, 16), depths=(1, 1))
    with pytest.raises(RegistryError, match="convnext_xxlarge: unknown activation 'relu'"):
        convnext_xxlarge(activation="relu")  # type: ignore[arg-type]
