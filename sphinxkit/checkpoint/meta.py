"""Meta's layout: ``consolidated.NN.pth`` and ``params.json``."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from sphinxkit.checkpoint.entries import Replicas
from sphinxkit.checkpoint.fitting import Fitting, check_shard_count
from sphinxkit.checkpoint.keymap import NameRule, meta_key_map
from sphinxkit.checkpoint.llm_config import llm_from_meta, refuse_experts, text_recipe
from sphinxkit.checkpoint.reader import EMBEDDING, Checkpoint, embedding_rows
from sphinxkit.checkpoint.sharding import merge_shards
from sphinxkit.checkpoint.tokenizer_file import find_tokenizer
from sphinxkit.checkpoint.verification import torch_files_checks
from sphinxkit.errors import CheckpointError, raise_errors
from sphinxkit.tensor_files.files import read_json
from sphinxkit.tensor_files.lazy import StoredTensor
from sphinxkit.tensor_files.torch_zip import read_torch_file

META_SHARD_NAME = "consolidated.{:02d}.pth"
PARAMS_NAME = "params.json"
_SHARD = re.compile(r"consolidated\.(\d+)\.pth")


def find_meta_shards(folder: Path) -> list[Path]:
    """The ``consolidated.NN.pth`` files of a folder, in order; empty if there are none.

    Raises:
        CheckpointError: A number before the last one is missing.
    """
    numbered = {int(m.group(1)): path for path in folder.iterdir() if (m := _SHARD.fullmatch(path.name))}
    if not numbered:
        return []
    missing = [META_SHARD_NAME.format(rank) for rank in range(max(numbered)) if rank not in numbered]
    raise_errors(f"{folder}: shards are missing; fetch them", missing)
    return [numbered[rank] for rank in sorted(numbered)]


def _split_dim(dim: int | None, rule: NameRule, stored: StoredTensor) -> int | None:
    """Llama 3 splits the embedding along the vocabulary, Llama 1 and 2 along the width; the shape tells."""
    if rule.ours == EMBEDDING and dim is not None and len(stored.shape) == 2 and stored.shape[1] == dim:
        return 0
    return rule.split_dim


def open_meta(folder: Path, replicas: Replicas = "equal", defer: bool = False) -> Checkpoint:
    """Open a folder in Meta's layout.

    Args:
        folder: With ``consolidated.NN.pth`` and, for a recipe, ``params.json``.
        replicas: See :data:`~sphinxkit.checkpoint.entries.Replicas`.
        defer: Whether faults of names and shapes are kept in ``Checkpoint.faults`` instead of raised.
    Raises:
        CheckpointError: Damaged or missing files, names or shapes that do not fit, a tokenizer of the wrong size.
    """
    files = find_meta_shards(folder)
    if not files:
        raise CheckpointError(f"{folder}: no consolidated.NN.pth in it")
    path = folder / PARAMS_NAME
    params = read_json(path) if path.is_file() else None
    if params is not None and params.pop("use_scaled_rope", False):
        raise CheckpointError(f"{path}: use_scaled_rope (Llama 3.1's rotary scaling) is not supported yet")
    dim = params.get("dim") if params is not None else None
    if dim is not None and not isinstance(dim, int):
        raise CheckpointError(f"{path}: 'dim' is {dim!r}, expected a positive whole number")

    def split_dim(rule: NameRule, stored: StoredTensor) -> int | None:
        return _split_dim(dim, rule, stored)

    shards = [read_torch_file(file) for file in files]
    refuse_experts((name for shard in shards for name in shard), str(files[0]))
    if (query := shards[0].get("layers.0.attention.wq.weight")) is not None:
        check_shard_count(folder, query.shape, len(files), META_SHARD_NAME)
    fitting = Fitting(folder, meta_key_map())
    entries, _ = merge_shards(folder, shards, fitting.key_map, replicas, split_dim, fitting.faults)
    rows = embedding_rows(entries)
    vocab_size = None if params is None else fitting.vocab_size(entries, params)
    if params is None or vocab_size is None:
        if not defer:
            fitting.raise_all()
        none = f"there is no {PARAMS_NAME}, so the model's numbers are not known; give a recipe"
        recipe: dict[str, Any] | str = none
        if params is not None:
            recipe = fitting.no_embedding(llm_from_meta(params, path, 1), entries)
    else:
        llm = llm_from_meta(params, path, vocab_size)
        fitting.compare(llm, entries, path, defer)
        recipe = text_recipe(llm)
    return Checkpoint(
        folder,
        "meta",
        entries,
        files,
        recipe=recipe,
        tokenizer_path=find_tokenizer(folder, rows),
        metadata={"config": params, "num_shards": len(files)},
        checks=partial(torch_files_checks, files),
        key_map=fitting.key_map,
        faults=fitting.faults,
    )
