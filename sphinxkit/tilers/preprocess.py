"""PIL images to CLIP-normalised pixels: pad to a square, resize, normalise, bitwise equal to the public pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sphinxkit.errors import DataError, ShapeError
from sphinxkit.geometry import ImageGeometry
from sphinxkit.pixels import CLIP_MEAN, CLIP_STD
from sphinxkit.tilers.images import ImageSource, load_image
from sphinxkit.tilers.resize import resize_axis

# Source: LLaMA2-Accessory, accessory/data/transform.py: int(255 * x) of CLIP_MEAN, truncated.
PAD_COLOR = (122, 116, 104)
# Longest side and smallest target taken. Our choice: JPEG's own limit; and between the two no filter of Pillow's is so
# wide that its fixed-point weights could change the padding's flat colour (see resize.py).
MAX_SIDE = 65_535
MIN_IMAGE_SIZE = 8

# CLIP_MEAN and CLIP_STD for (3, H, W) arrays
MEAN = np.array(CLIP_MEAN, dtype=np.float32).reshape(3, 1, 1)
STD = np.array(CLIP_STD, dtype=np.float32).reshape(3, 1, 1)


def pad_and_resize(image: ImageSource, image_size: int) -> Image.Image:
    """Pad an image to a square and resize it, bit for bit as Pillow would resize the padded square.

    The image is centred (the odd pixel at the bottom or right) on the CLIP mean colour. Rows and columns of padding
    alone keep their colour, so only the rest is resized. This is faster than resizing the square and keeps memory small
    at extreme aspect ratios.

    Args:
        image: A PIL image of any mode, or another ``ImageSource``; made upright RGB first, alpha dropped.
        image_size: Side of the result in pixels, at least 8.
    Returns:
        An RGB image of image_size x image_size.
    Raises:
        DataError: Not an image, a mode without an RGB form, an empty or damaged image, a side above 65535 pixels.
        ShapeError: ``image_size`` is below 8.
    Source: LLaMA2-Accessory, accessory/data/transform.py, padded_resize.
    """
    _check_size(image_size)
    if not isinstance(image, Image.Image):
        image = load_image(image)
    if min(image.size) < 1:
        raise DataError(f"preprocess: the image is empty, {image.width}x{image.height} pixels")
    if max(image.size) > MAX_SIDE:
        raise DataError(
            f"preprocess: the image is {image.width}x{image.height} pixels, longer than {MAX_SIDE} on a side; "
            "crop it or scale it down first"
        )
    rgb = load_image(image)
    geometry = ImageGeometry(rgb.width, rgb.height)
    x, y = geometry.offset
    columns, left = resize_axis(rgb, 0, geometry.side, x, image_size, PAD_COLOR)
    both, top = resize_axis(columns, 1, geometry.side, y, image_size, PAD_COLOR)
    if both.size == (image_size, image_size):
        return both
    square = Image.new("RGB", (image_size, image_size), PAD_COLOR)
    square.paste(both, (left, top))
    return square


@dataclass(frozen=True)
class Preprocessor:
    """``preprocess`` with its size fixed: a callable from images to pixels.

    Args:
        image_size: Side of the pixel tensor.
    """

    image_size: int

    def __call__(self, images: ImageSource | Sequence[ImageSource]) -> Tensor:
        """See ``preprocess``."""
        return preprocess(images, self.image_size)


def preprocess(images: ImageSource | Sequence[ImageSource], image_size: int) -> Tensor:
    """Images to the pixels that SphinxModel, tilers and encoders take.

    Args:
        images: One image or several, of any size and mode; see ``images.ImageSource``.
        image_size: Side of the square they are padded and resized to, in pixels.
    Shape:
        return: (B, 3, image_size, image_size) float32, CLIP-normalised
    Raises:
        DataError: No image, something that is not an image, or an image that cannot be used.
        ShapeError: ``image_size`` is below 8.
    Source: LLaMA2-Accessory, accessory/data/transform.py, padded_resize.
    """
    is_several = isinstance(images, Sequence) and not isinstance(images, str | bytes | bytearray)
    batch: list[Any] = list(images) if is_several else [images]  # type: ignore[arg-type]
    if not batch:
        raise DataError("preprocess: no images were given")
    _check_size(image_size)
    pixels = torch.empty(len(batch), 3, image_size, image_size, dtype=torch.float32, device="cpu")
    for index, image in enumerate(batch):
        try:
            square = pad_and_resize(image, image_size)
        except DataError as error:
            if len(batch) == 1:
                raise
            raise DataError(f"{error} (image {index} of {len(batch)}, counted from 0)") from error
        _normalise(np.asarray(square), pixels[index].numpy())
    return pixels


def _check_size(image_size: object) -> None:
    if not (isinstance(image_size, Integral) and MIN_IMAGE_SIZE <= int(image_size) <= MAX_SIDE):
        raise ShapeError(
            f"preprocess: image_size must be {MIN_IMAGE_SIZE} to {MAX_SIDE} whole pixels, got {image_size!r:.40}"
        )


def _normalise(square: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    # numpy, not torch: as fast on this little, and it does not wait for a thread pool that other work keeps busy
    np.copyto(out, square.transpose(2, 0, 1))
    np.divide(out, np.float32(255), out=out)  # this order of float32 operations is the public one
    np.subtract(out, MEAN, out=out)
    np.divide(out, STD, out=out)
