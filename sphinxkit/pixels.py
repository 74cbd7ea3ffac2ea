"""Pixel statistics and the one way in which SPHINX resizes pixel tensors.

Every pixel tensor between parts of sphinxkit is (B, 3, H, W), CLIP-normalised; an encoder trained with other
statistics renormalises its own input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sphinxkit.errors import DataError, RegistryError, ShapeError
from sphinxkit.to_device import to_device

# Source: openai/CLIP, clip/clip.py, _transform.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# Source: torchvision's ImageNet statistics, used by DINOv2 (facebookresearch/dinov2, data/transforms.py).
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

RESIZE_MODES = ("nearest", "bicubic")


# Largest magnitude of CLIP-normalised pixels, our choice. White is 2.15 and black -1.79 (CLIP_MEAN, CLIP_STD); 10
# leaves room for noise and filters, and an image of 0..255 exceeds it unless it is nearly black.
MAX_NORMALIZED = 10.0


def check_pixels(pixels: object, where: str) -> Tensor:
    """Raise unless ``pixels`` is a floating (B, 3, H, W) tensor.

    Args:
        pixels: What came.
        where: Who asks, for the message.
    Shape:
        pixels: (B, 3, H, W)
    Returns:
        ``pixels``.
    Raises:
        DataError: No tensor: a PIL image or an array.
        ShapeError: Another rank, channel count or an integer dtype.
    """
    if not isinstance(pixels, Tensor):
        kind = f"{type(pixels).__module__.split('.')[0]} {type(pixels).__name__}"
        raise DataError(
            f"{where}: expected a tensor of floating pixels (B, 3, H, W), got {kind}; "
            "sphinxkit.tilers.preprocess makes one from PIL images"
        )
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
        raise ShapeError(f"{where}: expected floating pixels (B, 3, H, W), got {pixels.dtype} {tuple(pixels.shape)}")
    return pixels


def check_normalized(pixels: Tensor, where: str) -> None:
    """Raise if the values cannot be CLIP-normalised pixels, as those of an image of 0..255.

    Values on other devices than the CPU are not read, as the host would have to wait for the device. Subclasses of
    Tensor are not read either: those that stand in for one while memory is predicted have no values.

    Args:
        pixels: What came.
        where: Who asks, for the message.
    Shape:
        pixels: (B, 3, H, W)
    Raises:
        DataError: A value is beyond ``MAX_NORMALIZED`` or not finite.
    """
    if pixels.device.type != "cpu" or type(pixels) is not Tensor or not pixels.numel() or torch.compiler.is_compiling():
        return
    low, high = (float(end) for end in torch.aminmax(pixels.detach()))
    if not (low >= -MAX_NORMALIZED and high <= MAX_NORMALIZED):
        raise DataError(
            f"{where}: expected CLIP-normalised pixels (about -1.8 to 2.2), got values from {low:.4g} to {high:.4g}; "
            "sphinxkit.tilers.preprocess normalises images of 0..255"
        )


def resize_pixels(pixels: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Resize a pixel tensor through float16, as SPHINX was trained.

    The public implementation casts the image to float16 for every tensor interpolation, in float32 runs too; the same
    operator on a float16 tensor reproduces it to the bit on CPU. A resize to the same size still rounds to float16.

    Args:
        pixels: Any floating dtype.
        size: (height, width) in pixels.
        mode: "bicubic" (align_corners False, no antialias) or "nearest" (index floor(i * in / out)).
    Shape:
        pixels: (B, 3, H, W)
        return: (B, 3, *size), dtype of ``pixels``
    Raises:
        ShapeError: ``pixels`` is not (B, 3, H, W), or ``size`` is not positive.
        RegistryError: Unknown mode.
    Source: LLaMA2-Accessory, accessory/model/LLM/llama_ens5.py, encode_image.
    """
    check_pixels(pixels, "resize_pixels")
    if min(size) < 1:
        raise ShapeError(f"resize_pixels: size must be positive, got {size}")
    if mode not in RESIZE_MODES:
        raise RegistryError(f"resize_pixels: unknown mode {mode!r}; known: {', '.join(RESIZE_MODES)}")
    half = pixels.to(torch.float16)
    if mode == "nearest":
        resized = F.interpolate(half, size=size, mode="nearest")
    else:
        resized = F.interpolate(half, size=size, mode=mode, align_corners=False)
    return resized.to(pixels.dtype)


def renormalize(
    pixels: Tensor,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Tensor:
    """Turn CLIP-normalised pixels into pixels normalised with other statistics.

    Args:
        pixels: CLIP-normalised.
        mean: Per-channel mean wanted, on the [0, 1] scale.
        std: Per-channel standard deviation wanted.
    Shape:
        pixels, return: (B, 3, H, W)
    """

    def channel(values: tuple[float, float, float]) -> Tensor:
        """(1, 3, 1, 1)."""
        return to_device(values, pixels.device, pixels.dtype).view(1, 3, 1, 1)

    return (pixels * channel(CLIP_STD) + channel(CLIP_MEAN) - channel(mean)) / channel(std)
