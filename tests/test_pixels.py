from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sphinxkit.errors import DataError, RegistryError, ShapeError
from sphinxkit.pixels import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    MAX_NORMALIZED,
    check_normalized,
    check_pixels,
    renormalize,
    resize_pixels,
)

FLOAT32 = 1e-6  # float32 against float64 for values of about 2
HALF = 4e-3  # two float16 roundings (of the input and of the weights) of values below 4: the step there is 2e-3


def test_equal_size_still_rounds_to_half() -> None:
    pixels = torch.randn(1, 3, 8, 8)
    for mode in ("nearest", "bicubic"):
        resized = resize_pixels(pixels, (8, 8), mode)
        assert resized.dtype == torch.float32
        assert torch.equal(resized, pixels.half().float())
        assert not torch.equal(resized, pixels)


def test_nearest_follows_the_index_formula() -> None:
    pixels = torch.randn(1, 3, 224, 224).half().float()
    index = torch.arange(256) * 224 // 256
    assert torch.equal(resize_pixels(pixels, (256, 256), "nearest"), pixels[:, :, index][..., index])


def test_bicubic_against_float64() -> None:
    pixels = torch.randn(1, 3, 12, 12).clamp(-2, 2)
    position = (torch.arange(6, dtype=torch.float64) + 0.5) * 2 - 0.5
    weights = torch.zeros(6, 12, dtype=torch.float64)
    for row, at in enumerate(position.tolist()):
        base = int(at // 1)
        for tap in range(base - 1, base + 3):
            x = abs(at - tap)  # Keys' cubic with a = -0.75, torch's choice
            value = (1.25 * x - 2.25) * x * x + 1 if x <= 1 else ((-0.75 * x + 3.75) * x - 6) * x + 3
            weights[row, min(max(tap, 0), 11)] += value
    oracle = weights @ pixels.double() @ weights.T
    torch.testing.assert_close(resize_pixels(pixels, (6, 6), "bicubic").double(), oracle, atol=HALF, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    assert resize_pixels(torch.randn(2, 3, 8, 8, dtype=dtype), (4, 6), "bicubic").dtype == dtype


def test_renormalize_against_float64() -> None:
    raw = torch.rand(2, 3, 4, 4, dtype=torch.float64)

    def normalise(mean, std):
        return (raw - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).double().view(3, 1, 1)

    clip = normalise(CLIP_MEAN, CLIP_STD).float()
    imagenet = renormalize(clip, IMAGENET_MEAN, IMAGENET_STD)
    assert imagenet.dtype == torch.float32
    torch.testing.assert_close(imagenet.double(), normalise(IMAGENET_MEAN, IMAGENET_STD), atol=FLOAT32, rtol=0)


@pytest.mark.parametrize(
    "pixels", [torch.zeros(3, 4, 4), torch.zeros(1, 4, 4, 4), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)]
)
def test_other_tensors_are_refused(pixels: torch.Tensor) -> None:
    with pytest.raises(ShapeError, match=r"here: expected floating pixels \(B, 3, H, W\), got torch"):
        check_pixels(pixels, "here")
    with pytest.raises(ShapeError, match="resize_pixels: expected floating pixels"):
        resize_pixels(pixels, (2, 2), "nearest")


@pytest.mark.parametrize(
    ("pixels", "kind"),
    [
        (np.zeros((4, 4, 3), np.uint8), "numpy ndarray"),
        (np.zeros((1, 3, 4, 4), np.float32), "numpy ndarray"),
        (Image.new("RGB", (4, 4)), "PIL Image"),
        ([1.0], "builtins list"),
    ],
)
def test_what_is_no_tensor_is_named(pixels: object, kind: str) -> None:
    with pytest.raises(DataError, match=rf"here: expected a tensor .* got {kind}; sphinxkit.tilers.preprocess"):
        check_pixels(pixels, "here")


@pytest.mark.parametrize(
    ("value", "said"), [(255.0, "0 to 255"), (-11.0, "-11 to 0"), (float("nan"), "nan"), (float("inf"), "to inf")]
)
def test_pixels_that_are_not_normalized_are_named(value: float, said: str) -> None:
    pixels = torch.zeros(1, 3, 4, 4)
    pixels[0, 1, 2, 3] = value
    with pytest.raises(DataError, match=f"here: expected CLIP-normalised pixels .* got values from .*{said}"):
        check_normalized(pixels, "here")


def test_normalized_pixels_pass() -> None:
    black_and_white = torch.tensor([-1.8, 2.2, MAX_NORMALIZED]).view(1, 3, 1, 1)
    check_normalized(black_and_white, "here")
    check_normalized(torch.zeros(0, 3, 4, 4), "here")
    check_normalized(torch.full((1, 3, 4, 4), 255.0, device="meta"), "here")  # it has no values to read


def test_options_are_checked() -> None:
    with pytest.raises(ShapeError, match=r"size must be positive, got \(0, 4\)"):
        resize_pixels(torch.zeros(1, 3, 4, 4), (0, 4), "nearest")
    with pytest.raises(RegistryError, match="unknown mode 'area'; known: nearest, bicubic"):
        resize_pixels(torch.zeros(1, 3, 4, 4), (4, 4), "area")
