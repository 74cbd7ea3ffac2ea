"""Converting a checkpoint from any format to any other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from sphinxkit import checkpoint
from sphinxkit.recipe.open_checkpoints import Progress, everything, with_total
from sphinxkit.recipe.recipe import Recipe


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: str = "sphinxkit",
    num_shards: int | None = None,
    dtype: torch.dtype | None = None,
    llm_only: bool = False,
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    overwrite: bool = False,
    verify: bool = True,
    replicas: Literal["equal", "first"] = "equal",
    llama_type: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Convert a checkpoint, tensor by tensor; about one tensor is in memory at a time.

    What the released files hold beyond the model (CLIP's text side and the like) is carried along where the format has
    a place for it.

    Args:
        source: Directory of a checkpoint, or ``hf://org/repo``.
        output: Directory to write; it appears when it is complete.
        format: A name of ``sphinxkit.checkpoint.formats``: "sphinxkit", "sphinx" (as released), "meta" or "hf".
        num_shards: Tensor-parallel shards ("sphinx" and "meta"); None: 1.
        dtype: Of every floating-point tensor; None: as stored.
        llm_only: Whether to write the language model alone; "meta" and "hf" hold no more.
        recipe: Overrides what the checkpoint says about the model's structure.
        overwrite: Whether a checkpoint at ``output`` may be replaced.
        verify: Whether to compare the checksums that the checkpoint's files carry.
        replicas: What to do where shards differ in a tensor that each holds whole: "equal" refuses, "first" takes the
            first shard's.
        llama_type: The type of a released directory without ``meta.json``.
        progress: Called with a tensor's name, its bytes, and the bytes of all, when it has been read.
    Returns:
        ``output``.
    Raises:
        CheckpointError: The checkpoint cannot be opened, or the format cannot hold it.
        RecipeError: The recipe is not valid.
    """
    layout = checkpoint.formats.get_format(format)
    with checkpoint.open(checkpoint.resolve(os.fspath(source)), replicas=replicas, llama_type=llama_type) as opened:
        found = Recipe.find(recipe) if recipe is not None else None
        if found is None and opened.has_recipe:
            found = Recipe.of_checkpoint(opened)
        carried = layout.has_unused and not llm_only
        return checkpoint.save(
            Path(output),
            opened,
            format=format,
            part="llm" if llm_only else None,
            num_shards=num_shards,
            dtype=dtype,
            recipe=None if found is None else found.resolved(),
            tokenizer=opened.tokenizer_path,
            unused=opened.unused if carried else None,
            overwrite=overwrite,
            progress=with_total(progress, everything(opened, llm_only) if carried or llm_only else opened, dtype),
            verify=verify,
        )
