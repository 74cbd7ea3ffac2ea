"""Converting a checkpoint from any format to any other, or a recipe's public encoders to a folder of our own format."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch

from sphinxkit import checkpoint
from sphinxkit.errors import CheckpointError, RecipeError
from sphinxkit.recipe.hf_folder import files_beside, layout_of
from sphinxkit.recipe.open_checkpoints import Overlay, Progress, everything, open_overlaid, with_total
from sphinxkit.recipe.recipe import Recipe, shipped_recipes
from sphinxkit.recipe.weights import open_encoder_weights, require_sources
from sphinxkit.tensor_source import joined

Part = Literal["llm", "encoders"]


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: str = "sphinxkit",
    part: Part | None = None,
    num_shards: int | None = None,
    dtype: torch.dtype | None = None,
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    overwrite: bool = False,
    verify: bool = True,
    replicas: Literal["equal", "first"] = "equal",
    llama_type: str | None = None,
    overlay: Overlay | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Convert a checkpoint, tensor by tensor; about one tensor is in memory at a time.

    Unused tensors of released files (such as CLIP's text tower) are kept if the format supports them.

    Args:
        source: Directory of a checkpoint, or ``hf://org/repo``. With ``part="encoders"`` also a model recipe (a shipped
            name or a ``.yaml`` file): its encoders are then read from where its ``weights:`` say.
        output: Directory to write (atomically).
        format: A name of ``sphinxkit.checkpoint.formats``: "sphinxkit", "sphinx" (as released), "meta" or "hf". A whole
            model as "hf" is the folder that :mod:`sphinxkit.integrations.transformers` and vLLM read.
        part: "llm" writes the language model alone ("meta" holds no more), "encoders" the vision encoders alone
            ("sphinxkit"), which training starts from; None writes everything.
        num_shards: Tensor-parallel shards ("sphinx" and "meta"); None: 1.
        dtype: Dtype of all floating-point tensors; None: as stored.
        recipe: Recipe to use instead of the checkpoint's.
        overwrite: Replace an existing checkpoint at ``output``.
        verify: Verify the checksums in the checkpoint's files.
        replicas: Policy if shards differ in a replicated tensor: "equal" raises an error, "first" uses the first shard.
        llama_type: Type of a released directory without ``meta.json``.
        overlay: A tuned directory (or several, the last counts) whose tensors take the place of the source's.
        tokenizer: File or directory of the tokenizer, where the source's own does not count.
        progress: Called after each read tensor with its name, its bytes and the total bytes.
    Returns:
        ``output``.
    Raises:
        CheckpointError: The checkpoint cannot be opened, or the format cannot hold it; an encoder's weights cannot be
            read or do not fit.
        RecipeError: The recipe is not valid, or does not say where its encoders' weights are.
    """
    checkpoint.formats.get_format(format)  # an unknown name is an error before anything is read
    target = Path(output)
    if part not in (None, "llm", "encoders"):
        raise CheckpointError(f"part={part!r}: expected 'llm', 'encoders' or None")
    if part == "encoders" and format != "sphinxkit":
        raise CheckpointError(f"part='encoders': only format 'sphinxkit' holds encoders alone, got {format!r}")
    if part == "encoders" and _is_recipe(source):
        if overlay or tokenizer is not None:
            raise CheckpointError("overlay= and tokenizer= are for a checkpoint, not for a recipe")
        return _convert_published(Recipe.find(os.fspath(source)), target, dtype, overwrite, progress)
    with open_overlaid(source, overlay, replicas=replicas, llama_type=llama_type) as opened:
        words = opened.tokenizer_path if tokenizer is None else Path(tokenizer)
        found = Recipe.find(recipe) if recipe is not None else None
        if found is None and opened.has_recipe:
            found = Recipe.of_checkpoint(opened)
        document = None if found is None else found.resolved()
        has_vision = part is None and document is not None and "vision" in document
        layout = checkpoint.formats.get_format(layout_of(format, has_vision))
        if part == "encoders":
            towers = joined([opened], lambda key: ".encoders." in key)
            with opened.verifying() if verify else nullcontext():
                return checkpoint.save(
                    target,
                    towers,
                    dtype=dtype,
                    recipe=document,
                    overwrite=overwrite,
                    progress=with_total(progress, towers, dtype),
                )
        carried = layout.has_unused and part is None
        return checkpoint.save(
            target,
            opened,
            format=layout.name,
            part=part,
            num_shards=num_shards,
            dtype=dtype,
            recipe=document,
            tokenizer=words,
            extra_files=files_beside(layout.name, found, words),
            unused=opened.unused if carried else None,
            overwrite=overwrite,
            progress=with_total(progress, everything(opened, part == "llm") if carried or part else opened, dtype),
            verify=verify,
        )


def _is_recipe(source: str | os.PathLike[str]) -> bool:
    name = os.fspath(source)
    return Path(name).suffix in (".yaml", ".yml") or (name in shipped_recipes() and not Path(name).is_dir())


def _convert_published(
    recipe: Recipe, target: Path, dtype: torch.dtype | None, overwrite: bool, progress: Progress | None
) -> Path:
    places = require_sources(recipe.of_kind("model"))
    silent = [place.path for place in places if place.source is None]
    if silent:
        raise RecipeError(f"recipe {recipe.source or recipe.name}: {', '.join(silent)} has no weights:")
    opened = open_encoder_weights(places)
    return checkpoint.save(
        target,
        opened.tensors,
        dtype=dtype,
        recipe=opened.followed(recipe.resolved()) | {"tokenizer": None},
        overwrite=overwrite,
        progress=with_total(progress, opened.tensors, dtype),
    )
