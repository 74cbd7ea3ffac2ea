"""Loading a model from a directory or the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch

from sphinxkit import checkpoint
from sphinxkit.checkpoint.llm_config import EMBEDDING
from sphinxkit.errors import CheckpointError, DataError
from sphinxkit.recipe.build import build_on_meta, check_place
from sphinxkit.recipe.open_checkpoints import open_overlaid
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
    overlay: str | Path | Sequence[str | Path] | None = None,
    tokenizer: str | Path | None = None,
    accelerate: Literal["auto", "compile"] | None = "auto",
) -> SphinxModel:
    """Load a model: a sphinxkit directory, or a released SPHINX, Meta or HF Llama one.

    Tensors are streamed one by one from memory-mapped files to their device and dtype.

    Args:
        path_or_hub_id: A directory, ``hf://org/repo``, or ``"nano"``, which is SPHINX-nano (a directory of that name is
            ``"./nano"`` or a ``Path``).
        recipe: Recipe to use instead of the directory's.
        device: Device of the weights.
        dtype: Dtype of all parameters, or its name such as "bfloat16".
        verify: Whether to compare the checksums that the files carry, in a second thread beside the loading: the
            SHA-256 of each file of sphinxkit's own directories, the CRC-32 of each record of torch files. Hugging
            Face's safetensors carry none.
        replicas: Policy if shards differ in a replicated tensor: "equal" raises an error, "first" uses the first shard.
        llama_type: Type of a released directory; counts before its ``meta.json``.
        overlay: A tuned directory (or several, the last counts) whose tensors take the place of the model's; it may
            hold a part of them, as LLaMA2-Accessory's do, which leave frozen encoders out. A PEFT adapter is merged.
        tokenizer: File or directory of the tokenizer, where it does not lie in the directory (or, for Meta's and
            LLaMA2-Accessory's, one above); counts before the directory's.
        accelerate: Acceleration mode, see ``SphinxModel.accelerate``: "auto" prepares fused layers when the first
            text is generated, "compile" adds ``torch.compile``, None is the plain model.

    Raises:
        CheckpointError: Files, keys, shapes or the tokenizer do not fit; one error lists them all.
        RecipeError: The recipe is not valid.
        DataError: The device, the dtype, the path's kind or ``accelerate`` is unknown.
        RegistryError: "compile" cannot run here.
    """
    device, dtype = check_place(device, dtype)
    if not isinstance(path_or_hub_id, str | Path):
        raise DataError(f"load: got {path_or_hub_id!r:.200}, expected one directory; overlay= lays others over it")
    options: dict[str, Any] = {"replicas": replicas, "llama_type": llama_type, "defer_errors": True}
    with open_overlaid(path_or_hub_id, overlay, **options) as source:
        found = Recipe.of_checkpoint(source) if recipe is None else Recipe.find(recipe)
        place = tokenizer or source.tokenizer_path
        words = None if place is None else Tokenizer(place)
        rows = source.shape(EMBEDDING)[0] if EMBEDDING in source.keys() else None  # noqa: SIM118
        if words is not None and rows is not None and words.vocab_size > rows:
            raise CheckpointError(f"{place}: the tokenizer has {words.vocab_size} pieces, the embedding {rows} rows")
        model = build_on_meta(found, dtype)
        model.tokenizer = words or model.tokenizer  # the reader has checked its size
        with source.verifying() if verify else nullcontext():
            checkpoint.load_into(model, source, device=device, dtype=dtype)
    model.accelerate(accelerate)
    return model.eval()
