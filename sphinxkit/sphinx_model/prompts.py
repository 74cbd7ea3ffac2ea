"""Prompts as the language model reads them: checked, tokenised, embedded, their images encoded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sphinxkit.errors import DataError
from sphinxkit.generation import Decoder, Sampling, check_context, truncate_left
from sphinxkit.sphinx_model.images import encode_each, list_images
from sphinxkit.sphinx_model.multimodal import join_image, num_positions
from sphinxkit.sphinx_model.parts import ModelParts
from sphinxkit.to_device import to_device


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


def encode_prompt(model: ModelParts, text: str) -> list[int]:
    """Beginning-of-sentence and the ids of a text, in which what the model's template marks as tokens are tokens."""
    tokenizer, template = model.require_tokenizer(), model.conversation
    if template is None or not template.specials:
        return tokenizer.encode(text, bos=True)
    return [*tokenizer.encode("", bos=True), *template.encode_text(text, tokenizer)[0]]


def tokenize_prompts(
    model: ModelParts,
    prompts: str | Sequence[str],
    pictures: Sequence[Any],
    truncate: Literal["left"] | None,
    max_new_tokens: int = 1,
) -> list[list[int]]:
    """Token ids of each prompt, checked to leave room for an answer; nothing is computed."""
    model.require_tokenizer()
    token_ids = []
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise DataError(f"prompt {row} is not text but {type(prompt).__name__}")
        if not prompt.strip() and pictures[row] is None:
            raise DataError(f"prompt {row} is empty, and there is no image")
        token_ids.append(encode_prompt(model, prompt))
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
    pictures = list_images(images, len(prompts))
    token_ids = tokenize_prompts(model, prompts, pictures, truncate, max_new_tokens)
    visual = iter(encode_each(model, [picture for picture in pictures if picture is not None]))
    embedded = []
    for picture, ids in zip(pictures, token_ids, strict=True):
        text = model.llm.embed(to_device(ids, model.device))
        embedded.append(Prompt(ids, join_image(text, None if picture is None else next(visual))))
    return embedded


def make_decoder(
    model: ModelParts,
    prompts: str | Sequence[str],
    images: Any,
    sampling: Sampling,
    seed: int | Sequence[int | None] | None,
    truncate: Literal["left"] | None,
    num_draft_tokens: int | None,
) -> Decoder:
    """A decoder of prompts with their images; see ``SphinxModel.generate`` for the arguments."""
    count = 1 if isinstance(prompts, str) or not isinstance(prompts, Sequence) else len(prompts)
    seeds = list(seed) if isinstance(seed, Sequence) else [seed] * count
    if len(seeds) != count:
        raise DataError(f"{len(seeds)} seeds for {count} prompts; give one, or one each")
    own = [dataclasses.replace(sampling, seed=each) for each in seeds]
    given = embed_prompts(model, prompts, images, truncate, sampling.max_new_tokens)
    return Decoder(
        model.llm,
        model.require_tokenizer(),
        [prompt.embeds for prompt in given],
        own,
        num_draft_tokens=num_draft_tokens,
        token_ids=[prompt.token_ids for prompt in given],
        end_ids=model.end_ids,
    )
