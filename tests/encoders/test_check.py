from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sphinxkit.encoders import Encoder, EncoderInfo, check_encoder
from sphinxkit.errors import ShapeError, SphinxkitError
from sphinxkit.features import VisionFeatures


class Good(Encoder):
    """A small encoder without fault; every subclass below breaks one thing."""

    def __init__(self, trainable: bool = False) -> None:
        trunk = nn.Sequential(nn.Conv2d(3, 6, 8, stride=8), nn.Dropout(0.5))
        super().__init__(
            trunk,
            name="good",
            embed_dim=6,
            num_prefix_tokens=1,
            grid_size=(2, 2),
            info=EncoderInfo(input_size=16),
            trainable=trainable,
        )

    def encode(self, pixels: Tensor) -> VisionFeatures:
        patches = self.trunk(pixels).flatten(2).transpose(1, 2)
        return VisionFeatures(prefix=patches.mean(1, keepdim=True), patches=patches, grid=(2, 2))


class Raises(Good):
    def encode(self, pixels: Tensor) -> VisionFeatures:
        raise KeyError("no weights")


class ReturnsTensor(Good):
    def encode(self, pixels: Tensor) -> VisionFeatures:
        return super().encode(pixels).tokens()  # type: ignore[return-value]


class LosesRows(Good):
    def encode(self, pixels: Tensor) -> VisionFeatures:
        return super().encode(pixels[:1])


class WrongDtype(Good):
    def encode(self, pixels: Tensor) -> VisionFeatures:
        features = super().encode(pixels)
        return VisionFeatures(features.prefix.double(), features.patches.double(), features.grid)


class NotFinite(Good):
    def encode(self, pixels: Tensor) -> VisionFeatures:
        features = super().encode(pixels)
        return VisionFeatures(features.prefix / 0.0, features.patches, features.grid)


class Blind(Good):
    def encode(self, pixels: Tensor) -> VisionFeatures:
        return super().encode(torch.ones_like(pixels))


class Noisy(Good):
    def encode(self, pixels: Tensor) -> VisionFeatures:
        features = super().encode(pixels)
        return VisionFeatures(features.prefix, features.patches + torch.randn(()), features.grid)


class MixesRows(Good):
    """Attends across the batch, as a stack with the axes swapped does."""

    def encode(self, pixels: Tensor) -> VisionFeatures:
        features = super().encode(pixels)
        return VisionFeatures(features.prefix, features.patches - features.patches.mean(0), features.grid)


class WakesUp(Good):
    def train(self, mode: bool = True) -> Encoder:
        nn.Module.train(self, mode)
        return self


class NeverTrains(Good):
    def __init__(self) -> None:
        super().__init__(trainable=True)

    def train(self, mode: bool = True) -> Encoder:
        nn.Module.train(self, False)
        return self


class BuildsGraph(Good):
    def forward(self, pixels: Tensor) -> VisionFeatures:
        return self.encode(self.prepare(pixels))


class BreaksGraph(Good):
    def __init__(self) -> None:
        super().__init__(trainable=True)

    def encode(self, pixels: Tensor) -> VisionFeatures:
        with torch.no_grad():
            return super().encode(pixels)


class FixedSize(Good):
    def prepare(self, pixels: Tensor) -> Tensor:
        return pixels


class FixedDtype(Good):
    def prepare(self, pixels: Tensor) -> Tensor:
        prepared = super().prepare(pixels)
        return prepared if pixels.dtype == self.dtype else prepared.to(pixels.dtype)


class FollowsPixelDtype(Good):
    def encode(self, pixels: Tensor) -> VisionFeatures:
        features = super().encode(pixels.float())
        return VisionFeatures(features.prefix, features.patches, features.grid)

    def forward(self, pixels: Tensor) -> VisionFeatures:
        features = super().forward(pixels)
        return VisionFeatures(features.prefix.to(pixels.dtype), features.patches.to(pixels.dtype), features.grid)


class InPlace(Good):
    def prepare(self, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return super().prepare(pixels).mul_(1.5)


class TakesAnything(Good):
    """Stretches what is not square and casts integers."""

    def prepare(self, pixels: Tensor) -> Tensor:
        return super().prepare(nn.functional.interpolate(pixels[:, :3].float(), size=(16, 16)))


class WrongError(Good):
    def prepare(self, pixels: Tensor) -> Tensor:
        try:
            return super().prepare(pixels)
        except ShapeError as error:
            raise TypeError("bad pixels") from error


def with_fact(name: str, value: object) -> Callable[[], Good]:
    def build() -> Good:
        encoder = Good()
        setattr(encoder, name, value)
        return encoder

    return build


def with_gradient() -> Good:
    encoder = Good()
    encoder.trunk[0].bias.requires_grad_()  # type: ignore[index, union-attr]
    return encoder


def with_frozen_bias() -> Good:
    encoder = Good(trainable=True)
    encoder.trunk[0].bias.requires_grad_(False)  # type: ignore[index, union-attr]
    return encoder


BROKEN: list[tuple[Callable[[], nn.Module], str]] = [
    (with_fact("name", ""), "fact: name must be a non-empty string, got ''"),
    (with_fact("embed_dim", 0), "fact: embed_dim must be a positive int, got 0"),
    (with_fact("num_prefix_tokens", -1), "fact: num_prefix_tokens must be an int of at least 0, got -1"),
    (with_fact("grid_size", 2), "fact: grid_size must be a pair (H, W), got 2"),
    (with_fact("info", {}), "fact: info must be an EncoderInfo, got {}"),
    (with_fact("info", EncoderInfo(input_size=0)), "fact: input_size must be a positive int, got 0"),
    (with_fact("info", EncoderInfo(input_size=16, std=(1.0, 0.0, 1.0))), "fact: info.std must be positive"),
    (with_fact("trainable", None), "fact: trainable must be a bool, got None"),
    (Raises, "forward: (3, 3, 16, 16) pixels raise KeyError: 'no weights'"),
    (ReturnsTensor, "shapes: forward must return VisionFeatures, got Tensor"),
    (LosesRows, "shapes: batch 1 differs from the pixels' batch 3"),
    (with_fact("embed_dim", 7), "shapes: width 6 differs from embed_dim 7"),
    (with_fact("num_prefix_tokens", 2), "shapes: prefix 1 differs from num_prefix_tokens 2"),
    (with_fact("grid_size", (4, 1)), "shapes: grid (2, 2) differs from grid_size (4, 1)"),
    (WrongDtype, "dtype: prefix is torch.float64, the parameters are torch.float32"),
    (NotFinite, "values: the features are not all finite"),
    (Blind, "values: two different images give the same features"),
    (Noisy, "determinism: two calls on the same pixels give different features"),
    (MixesRows, "rows: a row's features depend on the rest of the batch"),
    (WakesUp, "eval-safety: train() wakes 4 modules of a frozen encoder, the first is WakesUp"),
    (WakesUp, "eval-safety: the features of a frozen encoder change after train()"),
    (NeverTrains, "eval-safety: the encoder is trainable but does not follow train()"),
    (BuildsGraph, "freezing: the encoder is frozen but builds a graph"),
    (BreaksGraph, "freezing: the encoder is trainable but builds no graph"),
    (with_gradient, "freezing: 1 of 2 parameters require gradients although frozen, the first is trunk.0.bias"),
    (
        with_frozen_bias,
        "freezing: 1 of 2 parameters do not require gradients although trainable, the first is trunk.0.bias",
    ),
    (FixedSize, "pixels of side 24: ShapeError: vision features: 9 patches do not fill the grid 2x2"),
    (FixedDtype, "bfloat16 pixels: RuntimeError: "),
    (FollowsPixelDtype, "dtype: bfloat16 pixels give torch.bfloat16, not the parameters' torch.float32"),
    (InPlace, "pixels: forward changes them in place"),
    (TakesAnything, "errors: integer pixels must raise a ShapeError, nothing was raised"),
    (TakesAnything, "errors: four channels must raise a ShapeError, nothing was raised"),
    (TakesAnything, "errors: pixels that are not square must raise a ShapeError, nothing was raised"),
    (WrongError, "errors: pixels without a batch must raise a ShapeError, got TypeError: bad pixels"),
]


def with_other_input_size() -> Good:
    class Other(Good):
        input_size = 32  # type: ignore[assignment]

    return Other()


BROKEN.append((with_other_input_size, "fact: info.input_size 16 differs from input_size 32"))


def on_meta() -> Good:
    return Good().to("meta")


BROKEN.append((on_meta, "parameters: they are on the meta device and hold no values"))


@pytest.mark.parametrize("trainable", [False, True])
def test_a_good_encoder_has_no_breaches(trainable: bool) -> None:
    assert check_encoder(Good(trainable), strict=True) == []


@pytest.mark.parametrize(("build", "message"), BROKEN, ids=[message.split(",")[0] for _, message in BROKEN])
def test_every_breach_has_its_message(build: Callable[[], nn.Module], message: str) -> None:
    breaches = check_encoder(build())
    assert any(breach.startswith(message) for breach in breaches), breaches


@pytest.mark.parametrize(
    "build", [with_gradient, with_frozen_bias, BuildsGraph, MixesRows, Blind, with_fact("embed_dim", 7)]
)
def test_a_single_fault_is_a_single_message(build: Callable[[], nn.Module]) -> None:
    assert len(check_encoder(build())) == 1


def test_any_module_may_come() -> None:
    breaches = check_encoder(nn.Linear(2, 2))
    assert len(breaches) == 7
    assert all("got None" in breach for breach in breaches)


def test_modes_and_random_state_are_given_back() -> None:
    encoder: Any = Good(trainable=True)
    encoder.trunk[1].eval()
    state = torch.get_rng_state()
    assert check_encoder(encoder) == []
    assert (encoder.training, encoder.trunk[1].training) == (True, False)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_strict_raises_with_every_breach() -> None:
    with pytest.raises(
        SphinxkitError, match=r"WakesUp is not a conforming encoder:\n- eval-safety: .*\n- eval-safety: "
    ):
        check_encoder(WakesUp(), strict=True)


def test_rows_need_a_batch() -> None:
    with pytest.raises(ShapeError, match="batch_size must be at least 2 to compare rows, got 1"):
        check_encoder(Good(), batch_size=1)
