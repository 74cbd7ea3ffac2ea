from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sphinxkit.encoders import Encoder, EncoderInfo
from sphinxkit.encoders.base import check_divisible
from sphinxkit.errors import DataError, ShapeError
from sphinxkit.features import VisionFeatures
from sphinxkit.pixels import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, resize_pixels

# float32 renormalisation of values of order one against float64: a few units in the last place.
RENORMALIZE_ATOL = 2e-6


class Patchify(Encoder):
    """One 4x4 patch convolution and a dropout that must sleep when frozen."""

    def __init__(self, trainable: bool = False, **info: object) -> None:
        trunk = nn.Sequential(nn.Conv2d(3, 5, 4, stride=4), nn.Dropout(0.5))
        facts = EncoderInfo(input_size=8, **info)  # type: ignore[arg-type]
        super().__init__(
            trunk,
            name="patchify",
            embed_dim=5,
            num_prefix_tokens=0,
            grid_size=(2, 2),
            info=facts,
            trainable=trainable,
        )

    def encode(self, pixels: Tensor) -> VisionFeatures:
        patches = self.trunk(pixels).flatten(2).transpose(1, 2)
        return VisionFeatures(prefix=patches[:, :0], patches=patches, grid=self.grid_size)


def test_frozen_encoder_sleeps_through_train() -> None:
    encoder = Patchify()
    around = nn.Sequential(encoder)
    around.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    pixels = torch.randn(2, 3, 8, 8, requires_grad=True)
    assert not encoder(pixels).tokens().requires_grad
    assert torch.equal(encoder(pixels).tokens(), encoder(pixels).tokens())


def test_trainable_encoder_is_a_normal_module() -> None:
    encoder = Patchify(trainable=True)
    assert encoder.training
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    encoder(torch.randn(1, 3, 8, 8)).tokens().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    assert not encoder.eval().training
    assert encoder.train() is encoder
    assert encoder.training


def test_pixels_of_the_right_size_and_statistics_are_left_alone() -> None:
    pixels = torch.randn(2, 3, 8, 8)
    assert Patchify().prepare(pixels) is pixels


@pytest.mark.parametrize("mode", ["nearest", "bicubic"])
def test_other_sizes_are_resized_through_float16(mode: str) -> None:
    pixels = torch.randn(2, 3, 7, 7)
    prepared = Patchify(resize_mode=mode).prepare(pixels)
    assert torch.equal(prepared, resize_pixels(pixels, (8, 8), mode))
    assert torch.equal(prepared, prepared.half().float())


def test_nearest_takes_the_pixel_at_the_floor() -> None:
    pixels = torch.arange(7.0).expand(1, 3, 7, 7)
    assert Patchify(resize_mode="nearest").prepare(pixels)[0, 0, 0].tolist() == [0, 0, 1, 2, 3, 4, 5, 6]


def test_statistics_are_exchanged_in_float32_before_the_cast() -> None:
    encoder = Patchify(mean=IMAGENET_MEAN, std=IMAGENET_STD)
    image = torch.rand(2, 3, 8, 8, dtype=torch.float64)

    def normalized(mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        return (image - image.new_tensor(mean).view(3, 1, 1)) / image.new_tensor(std).view(3, 1, 1)

    clip_pixels, expected = normalized(CLIP_MEAN, CLIP_STD), normalized(IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(encoder.prepare(clip_pixels.float()), expected.float(), rtol=0, atol=RENORMALIZE_ATOL)
    half = clip_pixels.bfloat16()
    assert torch.equal(encoder.prepare(half), encoder.prepare(half.float()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_have_the_parameters_dtype(dtype: torch.dtype) -> None:
    encoder = Patchify().to(dtype)
    assert encoder.dtype == dtype
    assert encoder(torch.randn(1, 3, 8, 8)).tokens().dtype == dtype


def test_repr_states_the_facts() -> None:
    assert "patchify, embed_dim=5, num_prefix_tokens=0, grid_size=(2, 2), input_size=8" in repr(Patchify())


def test_info_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EncoderInfo().input_size = 3  # type: ignore[misc]


def test_wrong_pixels_are_shape_errors() -> None:
    encoder = Patchify()
    with pytest.raises(ShapeError, match=r"encoder patchify: expected floating pixels \(B, 3, H, W\), got torch.uint8"):
        encoder(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ShapeError, match=r"expected square pixels \(B, 3, S, S\), got \(1, 3, 8, 4\)"):
        encoder(torch.zeros(1, 3, 8, 4))


@pytest.mark.parametrize("pixels", [Image.new("RGB", (8, 8)), np.zeros((8, 8, 3), np.uint8), "photo.jpg"])
def test_what_is_no_tensor_is_named(pixels: object) -> None:
    with pytest.raises(DataError, match="encoder patchify: expected a tensor of floating pixels"):
        Patchify()(pixels)


def test_pixels_of_0_to_255_are_named() -> None:
    image = torch.randint(0, 256, (2, 3, 8, 8)).float()
    with pytest.raises(DataError, match="encoder patchify: expected CLIP-normalised pixels"):
        Patchify()(image)


def test_a_subclass_must_encode() -> None:
    encoder = Encoder(
        nn.Identity(), name="none", embed_dim=1, num_prefix_tokens=0, grid_size=(1, 1), info=EncoderInfo(input_size=2)
    )
    with pytest.raises(NotImplementedError, match="Encoder must implement encode"):
        encoder(torch.zeros(1, 3, 2, 2))


@pytest.mark.parametrize(("value", "by"), [(225, 14), (0, 14), (14, 0)])
def test_check_divisible_names_both_sides(value: int, by: int) -> None:
    with pytest.raises(ShapeError, match=f"clip: image_size {value} is not a positive multiple of patch_size {by}"):
        check_divisible("clip", "image_size", value, "patch_size", by)
