"""Opening a released SPHINX directory."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from sphinxkit.checkpoint.encoders_json import encoder_options, with_encoder_options
from sphinxkit.checkpoint.entries import Replicas
from sphinxkit.checkpoint.fitting import Fitting
from sphinxkit.checkpoint.keymap import sphinx_key_map
from sphinxkit.checkpoint.lla2acc import find_shards, guess_vision, vision_of_type
from sphinxkit.checkpoint.llm_config import llm_from_meta, refuse_experts, text_recipe
from sphinxkit.checkpoint.reader import Checkpoint, embedding_rows
from sphinxkit.checkpoint.sharding import merge_shards
from sphinxkit.checkpoint.tokenizer_file import find_tokenizer
from sphinxkit.checkpoint.verification import torch_files_checks
from sphinxkit.errors import CheckpointError
from sphinxkit.tensor_files.files import read_json
from sphinxkit.tensor_files.torch_zip import read_torch_file


def open_released(
    folder: Path,
    replicas: Replicas = "equal",
    llama_type: str | None = None,
    kind: str = "model",
    defer: bool = False,
) -> Checkpoint:
    """Open a released SPHINX directory.

    Args:
        folder: With ``consolidated.NN-of-MM.model.pth``; ``config.json`` and ``meta.json`` tell the recipe,
            ``encoders.json`` (optional) the encoders' widths where they are not the full-size ones.
        replicas: See :data:`~sphinxkit.checkpoint.entries.Replicas`.
        llama_type: Used where there is no ``meta.json``.
        kind: "model", or "model-diff" for differences to a base model.
        defer: Whether faults of names and shapes are kept in ``Checkpoint.faults`` instead of raised.
    Raises:
        CheckpointError: Damaged, missing or contradicting files, unknown or unsupported types, names or shapes that
            do not fit, a tokenizer of the wrong size.
    """
    meta_path, config_path, encoders_path = (folder / f"{name}.json" for name in ("meta", "config", "encoders"))
    if meta_path.is_file():
        found = read_json(meta_path).get("llama_type")
        if not isinstance(found, str):
            raise CheckpointError(f"{meta_path}: 'llama_type' is {found!r}, expected a name")
        llama_type = found
    vision = None if llama_type is None else vision_of_type(llama_type, str(meta_path))
    files = find_shards(folder, kind)
    if not files:
        raise CheckpointError(f"{folder}: no consolidated.NN-of-MM.{kind}.pth in it")
    shards = [read_torch_file(file) for file in files]
    refuse_experts((name for shard in shards for name in shard), str(files[0]))
    if all(sphinx_key_map(None).to_ours(name) for shard in shards for name in shard):
        vision = None  # the language model alone, whatever the type's name
    elif llama_type is None:
        vision = guess_vision(list(shards[0]))
    fitting = Fitting(folder, sphinx_key_map(vision))
    entries, unused = merge_shards(folder, shards, fitting.key_map, replicas, faults=fitting.faults)
    if vision is not None and encoders_path.is_file():
        vision = with_encoder_options(vision, encoder_options(read_json(encoders_path), encoders_path))
    rows = embedding_rows(entries)
    recipe: dict[str, Any] | str
    config = read_json(config_path) if config_path.is_file() else None
    vocab_size = None if config is None else fitting.vocab_size(entries, config)
    if not defer and (config is None or vocab_size is None):
        fitting.raise_all()
    if config is None:
        recipe = "there is no config.json, so the model's numbers are not known; give a recipe"
    elif vocab_size is None:
        recipe = fitting.no_embedding(llm_from_meta(config, config_path, 1), entries)
    else:
        llm = llm_from_meta(config, config_path, vocab_size)
        fitting.compare(llm, entries, config_path, defer)
        recipe = text_recipe(llm)
        if vision is not None:
            recipe = {"kind": "model", "vision": vision, "llm": llm, "conversation": recipe["conversation"]}
            if llama_type is None:
                recipe = "there is no meta.json, so the views are unknown; pass llama_type= (--llama-type) or a recipe"
    return Checkpoint(
        folder,
        "sphinx",
        entries,
        files,
        unused,
        recipe,
        find_tokenizer(folder, rows),
        {"llama_type": llama_type, "config": config, "num_shards": len(files)},
        partial(torch_files_checks, files),
        fitting.key_map,
        fitting.faults,
    )
