"""Prompts as the language model reads them: checked, tokenised, embedded, their images encoded."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from sphinxkit.errors import DataError
from sphinxkit.generation import check_context, truncate_left
from sphinxkit.sphinx_model.multimodal import join_image, num_positions
from sphinxkit.sphinx_model.parts import ModelParts
from sphinxkit.to_device import to_device
from sphinxkit.vision import MAX_VIEWS

if TYPE_CHECKING:
    from PIL.Image import Image

ImageInput: TypeAlias = "Image | str | Path | Tensor"
"""A PIL image, a path, pixels (3, S, S) from ``preprocess``, or visual tokens (N_img, D) from ``encode_images``."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, ready for ``generation.Decoder``.

    Args:
        token_ids: The text, beginning-of-sentence first.
        embeds: Text and image tokens.
    Shape:
        embeds: (S, D)
    """

    token_ids: list[int]
    embeds: Tensor


def check_images(images: Any, num_prompts: int) -> list[Any]:
    """One image, or None, for each prompt."""
    if images is None:
        return [None] * num_prompts
    several = list(images) if isinstance(images, Sequence) and not isinstance(images, str) else [images]
    if len(several) != num_prompts:
        raise DataError(f"{len(several)} images for {num_prompts} prompts; give one each, None where there is none")
    return several


def image_pixels(model: ModelParts, images: Sequence[Any]) -> Tensor:
    """Pixels (B, 3, S, S) of images, some of which may be pixels already."""
    made = [image[None] if isinstance(image, Tensor) else model.preprocess([image]) for image in images]
    return torch.cat(made)


def encode_each(model: ModelParts, images: Sequence[Any]) -> list[Tensor]:
    """Visual tokens (N_img, D) of each image; the same image given twice is encoded once.

    Images are encoded a few at a time, so that memory does not grow with their number, and the next few are
    preprocessed meanwhile.
    """
    keys = [str(image) if isinstance(image, str | Path) else id(image) for image in images]
    found: dict[str | int, Tensor] = {}
    wanted: dict[str | int, Any] = {}
    for key, image in zip(keys, images, strict=True):
        if isinstance(image, Tensor) and image.ndim == 2:
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


def tokenize_prompts(
    model: ModelParts,
    prompts: str | Sequence[str],
    pictures: Sequence[Any],
    truncate: Literal["left"] | None,
    max_new_tokens: int = 1,
) -> list[list[int]]:
    """Token ids of each prompt, checked to leave room for an answer; nothing is computed."""
    tokenizer = model.require_tokenizer()
    token_ids = []
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise DataError(f"prompt {row} is not text but {type(prompt).__name__}")
        if not prompt.strip():
            raise DataError(f"prompt {row} is empty")
        token_ids.append(tokenizer.encode(prompt, bos=True))
    num_image_tokens = model.require_vision().num_tokens if any(picture is not None for picture in pictures) else 0
    limit = model.llm.max_seq_len
    for row, ids in enumerate(token_ids):
        slots = num_image_tokens if pictures[row] is not None else 0
        if truncate == "left":
            token_ids[row] = ids = truncate_left(f"prompt {row}", ids, max_new_tokens, limit, num_image_tokens=slots)
        positions = num_positions(len(ids), slots)
        check_context(f"prompt {row}", positions, limit, num_new_tokens=1, num_image_tokens=slots)
    return token_ids


@torch.no_grad()
def embed_prompts(
    model: ModelParts,
    prompts: str | Sequence[str],
    images: Any,
    truncate: Literal["left"] | None,
    max_new_tokens: int = 1,
) -> list[Prompt]:
    """See ``SphinxModel.embed_prompts``."""
    model.require_tokenizer()
    if not isinstance(prompts, Sequence):
        raise DataError(f"generate: prompts must be a text or a list of texts, got {type(prompts).__name__}")
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise DataError("generate: there are no prompts")
    if truncate not in (None, "left"):
        raise DataError(f"truncate must be None or 'left', got {truncate!r}")
    pictures = check_images(images, len(prompts))
    token_ids = tokenize_prompts(model, prompts, pictures, truncate, max_new_tokens)
    visual = iter(encode_each(model, [picture for picture in pictures if picture is not None]))
    embedded = []
    for picture, ids in zip(pictures, token_ids, strict=True):
        text = model.llm.embed(to_device(ids, model.device))
        embedded.append(Prompt(ids, join_image(text, None if picture is None else next(visual))))
    return embedded
