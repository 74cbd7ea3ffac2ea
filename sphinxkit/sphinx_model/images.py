"""Accepts images in any supported form and encodes them as image tokens."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from sphinxkit.errors import DataError, ShapeError
from sphinxkit.sphinx_model.parts import ModelParts
from sphinxkit.vision import MAX_VIEWS

if TYPE_CHECKING:
    from typing import BinaryIO

    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

ImageInput: TypeAlias = "Image | str | Path | bytes | BinaryIO | NDArray[np.uint8] | Tensor"
"""A PIL image, a path, a file's bytes, a binary file object, a uint8 array (H, W, 3), pixels (3, S, S) from
``preprocess``, or image tokens (N_img, D) from ``encode_images``."""


def list_images(images: Any, num_prompts: int) -> list[Any]:
    """Return one image, or None, for each prompt.

    Args:
        images: One image for a single prompt, or a sequence of one for each; None: none at all. Pixels (B, 3, S, S) are
            B images, and so are tokens (B, N_img, D) for several prompts.
        num_prompts: Number of prompts.
    Raises:
        DataError: The number of images differs from the number of prompts.
    """
    if images is None:
        return [None] * num_prompts
    if isinstance(images, Tensor) and (images.ndim == 4 or (images.ndim == 3 and num_prompts > 1)):
        several = list(images.unbind())
    elif isinstance(images, Sequence) and not isinstance(images, str | bytes | bytearray):
        several = list(images)
    else:
        several = [images]
    if len(several) != num_prompts:
        raise DataError(f"{len(several)} images for {num_prompts} prompts; give one each, None where there is none")
    return several


def image_pixels(model: ModelParts, images: Sequence[Any]) -> Tensor:
    """Preprocess images; inputs that are already pixels pass through.

    Args:
        model: Sets the image size.
        images: See ``ImageInput``; image tokens are not accepted.
    Shape:
        return: (B, 3, S, S)
    Raises:
        ShapeError: Pixels of another size.
        DataError: An image cannot be read.
    """
    size = model.require_vision().image_size
    made = []
    for image in images:
        if not isinstance(image, Tensor):
            made.append(model.preprocess([image]))
        elif tuple(image.shape) != (3, size, size) or not image.is_floating_point():
            raise ShapeError(
                f"image: expected pixels (3, {size}, {size}) of floats from preprocess, or tokens (N_img, D) from "
                f"encode_images, got {tuple(image.shape)} of {str(image.dtype).removeprefix('torch.')}"
            )
        else:
            made.append(image[None])
    return torch.cat(made)


@torch.no_grad()
def encode_each(model: ModelParts, images: Sequence[Any]) -> list[Tensor]:
    """Encode each image to tokens (N_img, D); an image given twice is encoded once.

    Images are encoded in small groups, so memory does not grow with their number. The next group is preprocessed
    meanwhile.

    Args:
        model: Encodes the images.
        images: See ``ImageInput``.
    Raises:
        DataError: An image cannot be read, or the model has no vision tower.
        ShapeError: Pixels of another size.
    """
    keys = [str(image) if isinstance(image, str | Path) else id(image) for image in images]
    found: dict[str | int, Tensor] = {}
    wanted: dict[str | int, Any] = {}
    for key, image in zip(keys, images, strict=True):
        if isinstance(image, Tensor) and image.ndim == 2:
            if image.shape[1] != model.llm.embed_dim:
                raise ShapeError(f"image tokens: expected (N_img, {model.llm.embed_dim}), got {tuple(image.shape)}")
            found[key] = image.to(model.device, model.dtype)
        else:
            wanted[key] = image
    if not wanted:
        return [found[key] for key in keys]
    names = list(wanted)
    size = max(1, MAX_VIEWS // model.require_vision().tiler.num_views)
    chunks = [names[start : start + size] for start in range(0, len(names), size)]
    with ThreadPoolExecutor(max_workers=1) as pool:
        pixels = image_pixels(model, [wanted[name] for name in chunks[0]])
        for index, chunk in enumerate(chunks):
            following = chunks[index + 1] if index + 1 < len(chunks) else None
            coming = None if following is None else pool.submit(image_pixels, model, [wanted[n] for n in following])
            found |= zip(chunk, model.encode_images(pixels, max_views=MAX_VIEWS), strict=True)
            if coming is not None:
                pixels = coming.result()
    return [found[key] for key in keys]
