"""Pixel statistics and the one way in which SPHINX resizes pixel tensors.

Every pixel tensor that travels through sphinxkit is (B, 3, H, W), CLIP-normalised; an encoder made with other
statistics renormalises for itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sphinxkit.errors import RegistryError, ShapeError
from sphinxkit.to_device import to_device

# Source: openai/CLIP, clip/clip.py, _transform.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# Source: torchvision's ImageNet statistics, used by DINOv2 (facebookresearch/dinov2, data/transforms.py).
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

RESIZE_MODES = ("nearest", "bicubic")


def check_pixels(pixels: Tensor, where: str) -> None:
    """Raise unless ``pixels`` is a floating (B, 3, H, W) tensor.

    Args:
        pixels: What came.
        where: Who asks, for the message.
    Raises:
        ShapeError: Another rank, channel count or an integer dtype.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
        raise ShapeError(f"{where}: expected floating pixels (B, 3, H, W), got {pixels.dtype} {tuple(pixels.shape)}")


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
        return to_device(values, pixels.device, pixels.dtype).view(1, 3, 1, 1)

    return (pixels * channel(CLIP_STD) + channel(CLIP_MEAN) - channel(mean)) / channel(std)
