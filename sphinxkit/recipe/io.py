"""Loading a model from a directory or the hub."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch

from sphinxkit import checkpoint
from sphinxkit.recipe.build import build_on_meta, check_place
from sphinxkit.recipe.recipe import Recipe
from sphinxkit.sphinx_model import SphinxModel
from sphinxkit.tokenizer import Tokenizer


def load(
    path_or_hub_id: str | Path,
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.float32,
    *,
    verify: bool = True,
    replicas: Literal["equal", "first"] = "equal",
    llama_type: str | None = None,
    accelerate: Literal["auto", "compile"] | None = "auto",
) -> SphinxModel:
    """Load a model: a sphinxkit directory, or a released SPHINX, Meta or HF Llama one.

    Tensors are streamed one by one from memory-mapped files to their device and dtype.

    Args:
        path_or_hub_id: A directory, or ``hf://org/repo``.
        recipe: Recipe to use instead of the directory's.
        device: Device of the weights.
        dtype: Dtype of all parameters, or its name such as "bfloat16".
        verify: Whether to compare the checksums that the files carry, in a second thread beside the loading: the
            SHA-256 of each file of sphinxkit's own directories, the CRC-32 of each record of torch files. Hugging
            Face's safetensors carry none.
        replicas: Policy if shards differ in a replicated tensor: "equal" raises an error, "first" uses the first shard.
        llama_type: Type of a released directory without ``meta.json``.
        accelerate: Acceleration mode, see ``SphinxModel.accelerate``: "auto" prepares fused layers when the first
            text is generated, "compile" adds ``torch.compile``, None is the plain model.

    Raises:
        CheckpointError: Files, keys, shapes or the tokenizer do not fit; one error lists them all.
        RecipeError: The recipe is not valid.
        DataError: The device, the dtype or ``accelerate`` is unknown.
        RegistryError: "compile" cannot run here.
    """
    device, dtype = check_place(device, dtype)
    path = checkpoint.resolve(path_or_hub_id)
    with checkpoint.open(path, replicas=replicas, llama_type=llama_type, defer_errors=True) as source:
        found = Recipe.of_checkpoint(source) if recipe is None else Recipe.find(recipe)
        tokenizer = Tokenizer(source.tokenizer_path) if source.tokenizer_path is not None else None
        model = build_on_meta(found, dtype)
        model.tokenizer = tokenizer or model.tokenizer  # the reader has checked its size
        with source.verifying() if verify else nullcontext():
            checkpoint.load_into(model, source, device=device, dtype=dtype)
    model.accelerate(accelerate)
    return model.eval()
