"""What transformers and vLLM read beside a whole SPHINX's weights: the files that need the built model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sphinxkit.errors import RecipeError
from sphinxkit.formatters.chat_template import chat_template
from sphinxkit.pixels import CLIP_MEAN, CLIP_STD
from sphinxkit.recipe.build import build_on_meta
from sphinxkit.recipe.recipe import Recipe
from sphinxkit.tensor_files.tokenizer_files import IMAGE_TOKEN
from sphinxkit.tokenizer import Tokenizer

PROCESSOR, IMAGE_PROCESSOR = "SphinxProcessor", "SphinxImageProcessor"


def layout_of(format: str, has_vision: bool) -> str:
    """The format that a whole model is written in: of "hf" there are two.

    Args:
        format: A name of ``sphinxkit.checkpoint.formats``.
        has_vision: Whether vision is written.
    """
    return "hf_sphinx" if format == "hf" and has_vision else format


def files_beside(layout: str, recipe: Recipe | Mapping[str, Any] | None, tokenizer: Path | None) -> dict[str, str]:
    """Name -> text of the files beside a checkpoint that its format does not write itself.

    Args:
        layout: From :func:`layout_of`.
        recipe: Of the model.
        tokenizer: Its file.
    Raises:
        RecipeError: The recipe does not describe a model with vision.
    """
    if layout != "hf_sphinx" or recipe is None:
        return {}
    return hf_files(Recipe.find(recipe), None if tokenizer is None else Tokenizer(tokenizer))


def hf_files(recipe: Recipe, tokenizer: Tokenizer | None) -> dict[str, str]:
    """Name -> text of the chat template and the configurations of the processors and of generation.

    Args:
        recipe: Of a model with vision.
        tokenizer: The model's; None leaves out what needs one.
    Raises:
        RecipeError: The model has no vision.
    """
    model = build_on_meta(recipe, torch.float32)
    model.tokenizer = words = tokenizer or model.tokenizer
    if model.vision is None:
        raise RecipeError(f"recipe {recipe.source or recipe.name}: has no vision; write the language model alone")
    size = model.vision.image_size
    image_processor = {
        "image_processor_type": IMAGE_PROCESSOR,
        "processor_class": PROCESSOR,
        "size": {"height": size, "width": size},
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }
    processor = {
        "processor_class": PROCESSOR,
        "image_token": IMAGE_TOKEN,
        "num_image_tokens": model.vision.num_tokens,
    }
    texts: dict[str, Any] = {"preprocessor_config.json": image_processor, "processor_config.json": processor}
    files = {name: json.dumps(content, indent=2) + "\n" for name, content in texts.items()}
    if words is None or model.conversation is None:
        return files
    stops = [stop for stop in model.conversation.stop if words.control_id(stop) is None]
    ends = dict.fromkeys(token for token in (words.eos_id, *model.end_ids) if token >= 0)
    unused = list(range(words.vocab_size, model.llm.vocab_size))  # rows that no text has; the image's token is one
    generation = {
        "do_sample": False,
        **({"bos_token_id": words.bos_id} if words.bos_id >= 0 else {}),
        "eos_token_id": list(ends),
        "pad_token_id": words.pad_id,
        **({"stop_strings": stops} if stops else {}),
        **({"suppress_tokens": unused} if unused else {}),
    }
    return files | {
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
        "chat_template.jinja": chat_template(model.conversation, has_bos=words.bos_id >= 0),
    }
