"""Writing a checkpoint in any format: checked first, then streamed tensor by tensor into a new folder."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch

from sphinxkit.atomic import atomic_directory
from sphinxkit.checkpoint.formats import Format, get_format, names
from sphinxkit.checkpoint.llm_config import EMBEDDING
from sphinxkit.checkpoint.open import detect
from sphinxkit.checkpoint.opened import Checkpoint
from sphinxkit.checkpoint.writing import Progress, TensorInput, WriteOptions, specs_of
from sphinxkit.errors import CheckpointError
from sphinxkit.tensor_files.tokenizer_files import (
    TokenizerSource,
    read_tokenizer_files,
    tokenizer_size,
)
from sphinxkit.tensor_source import TensorSource

MAX_SHARD_BYTES = 5 * 10**9  # Hugging Face's habit
_SPARE_BYTES = 2**20  # headers and small files beside the tensors; our choice
_OURS = (
    *("*.safetensors", "*.pth", "*.bin", "*.json", "*.yaml", "*.jinja", "*.model", "*.tiktoken"),
    *("README.md", "LICENSE*", "NOTICE*", "merges.txt", "vocab.txt"),
)
_WEIGHTS = (".safetensors", ".pth", ".bin")


def save(
    path: str | Path,
    source: TensorSource,
    *,
    format: str = "sphinxkit",
    part: Literal["llm"] | None = None,
    num_shards: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtype: torch.dtype | None = None,
    recipe: Mapping[str, Any] | None = None,
    recipe_yaml: str | None = None,
    tokenizer: TokenizerSource | None = None,
    unused: TensorSource | None = None,
    extra_files: Mapping[str, str] | None = None,
    files_of: Checkpoint | None = None,
    checksum: bool = True,
    delta: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    verify: bool = True,
) -> Path:
    """Write a checkpoint folder tensor by tensor, atomically.

    Args:
        path: Folder to make.
        source: Tensors in canonical names: an opened checkpoint, or ``MappingSource(model.state_dict())``.
        format: "sphinxkit", "sphinx" (the released layout), "meta", "hf" or another name of ``checkpoint.formats``.
        part: "llm" writes the language model alone, as a text-only checkpoint; "meta" and "hf" hold nothing else.
        num_shards: Tensor-parallel parts of "sphinx" and "meta" (default 1).
        max_shard_bytes: Size at which "sphinxkit" and "hf" start another file; a larger tensor has one for itself.
        dtype: Casts every floating-point tensor, the unused group's too; None keeps them.
        recipe: The model's recipe (a dictionary); None takes an opened checkpoint's own. "sphinx", "meta" and "hf"
            write their configuration from it.
        recipe_yaml: Text for ``recipe.yaml`` ("sphinxkit" only); None writes ``recipe``.
        tokenizer: ``tokenizer.model`` or ``tokenizer.json``: its path or content, or name -> content of its files.
        unused: The unused group of a released checkpoint, to be carried along ("sphinxkit" and "sphinx").
        extra_files: Name -> text of small files to put beside (``provenance.json``).
        files_of: The opened checkpoint whose small files come along where both are "hf": ``generation_config.json``,
            the ids of special tokens, what lies beside its tokenizer; None: ``source``, if it is an opened one.
        checksum: Whether to store SHA-256 sums ("sphinxkit" only); they are computed while writing.
        delta: The tensors are differences to a base model ("sphinx" only): the files are named ``*.model-diff.pth``.
        overwrite: Whether an existing checkpoint folder may be replaced. Folders with anything else in them never are.
        progress: Called with key and bytes for every tensor that was read.
        verify: Whether to compare the checksums of an opened checkpoint's files while they are read.
    Returns:
        ``path``.
    Raises:
        CheckpointError: The folder exists, the format cannot hold these tensors or lacks a number it needs, or the
            disk is full; nothing is left behind.
    """
    target = Path(path)
    layout = get_format(format)
    _check_target(target, overwrite)
    if recipe is None and isinstance(source, Checkpoint) and source.has_recipe:
        recipe = source.recipe
    if recipe is not None and part == "llm":
        recipe = {key: value for key, value in recipe.items() if key != "vision"}
    chosen = TensorInput(source, part, dtype, progress)
    carried = None if unused is None else TensorInput(unused, None, dtype, progress)
    if carried is not None and not carried.keys():
        carried = None
    _check_contents(target, chosen, carried, layout, part, num_shards, delta)
    num_bytes = sum(spec.num_bytes for part_ in (chosen, carried) if part_ is not None for spec in specs_of(part_))
    try:
        files = {} if tokenizer is None else read_tokenizer_files(tokenizer)
        if files:
            _check_vocabulary(target, files, chosen, layout)
        giver = source if files_of is None and isinstance(source, Checkpoint) else files_of
        place = giver.path if giver is not None and giver.format == format else None
        options = WriteOptions(recipe, recipe_yaml, num_shards or 1, max_shard_bytes, checksum, delta, files, place)
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if num_bytes + _SPARE_BYTES > free:
            raise CheckpointError(f"{target}: needs {num_bytes + _SPARE_BYTES:,} bytes, the disk has {free:,} free")
        with atomic_directory(target) as folder:
            _check_target(target, overwrite)  # again: another process may have written it before the lock was ours
            with source.verifying() if verify and isinstance(source, Checkpoint) else nullcontext():
                texts = layout.write(folder, chosen, carried, options)
            for name, content in files.items():
                (folder / name).write_bytes(content)
            for name, text in {**texts, **(extra_files or {})}.items():
                (folder / name).write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(f"{target}: the disk is full; nothing was left behind") from error
        raise CheckpointError(f"{target}: cannot be written: {error}") from error
    return target


def _check_target(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target}: is a file; a checkpoint is a folder")
    items = sorted(target.iterdir()) if target.exists() else []
    foreign = [item.name for item in items if item.is_dir() or not any(map(item.match, _OURS))]
    if items and (foreign or not _is_checkpoint(target, items)):
        raise CheckpointError(
            f"{target}: is not a checkpoint but holds {', '.join((foreign or [item.name for item in items])[:5])}; it "
            "will not be replaced"
        )
    if items and not overwrite:
        raise CheckpointError(f"{target}: exists already; pass overwrite=True to replace it")


def _is_checkpoint(folder: Path, items: Sequence[Path]) -> bool:
    """Whether one of the formats knows the folder and its weight files begin as such files do.

    A damaged checkpoint may be replaced, so nothing beyond the beginnings is read.
    """
    weights = [item for item in items if item.suffix in _WEIGHTS]
    if not weights or not all(map(_begins_as_weights, weights)):
        return False
    try:
        return bool(detect(folder)) or any(get_format(name).detect_delta(folder) for name in names())
    except CheckpointError:  # a format knows the names of the files; some are missing
        return True


def _begins_as_weights(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(9)
    if path.suffix == ".safetensors":
        return start[8:9] == b"{"
    return start[:4] == b"PK\x03\x04" or start[:1] == b"\x80"  # torch's zip layout, or a pickle


def _check_vocabulary(target: Path, tokenizer: Mapping[str, bytes], source: TensorInput, format: Format) -> None:
    if EMBEDDING not in source.keys():  # noqa: SIM118
        return
    rows, size = source.shape(EMBEDDING)[0], tokenizer_size(tokenizer)
    if size > rows:
        raise CheckpointError(
            f"{target}: the tokenizer has {size} pieces but the embedding has {rows} rows; it is not the tokenizer "
            "this model was trained with"
        )
    if size < rows and not format.may_pad_vocabulary:
        raise CheckpointError(
            f"{target}: the embedding has {rows} rows and the tokenizer {size} pieces; format {format.name!r} has no "
            "place for rows beyond the tokenizer (padding, tokens that were added); write format sphinxkit or hf"
        )


def _check_contents(
    target: Path,
    source: TensorInput,
    unused: TensorInput | None,
    format: Format,
    part: str | None,
    num_shards: int | None,
    delta: bool,
) -> None:
    if not source.keys():
        raise CheckpointError(f"{target}: there is nothing to save" + (f" in part {part!r}" if part else ""))
    if num_shards is not None and not format.has_shards:
        raise CheckpointError(f"num_shards={num_shards}: format {format.name!r} has no tensor-parallel shards")
    if num_shards is not None and num_shards < 1:
        raise CheckpointError(f"num_shards={num_shards}: expected a positive number")
    if delta and not format.has_deltas:
        raise CheckpointError(f"delta=True: format {format.name!r} has no place for differences to a base model")
    if unused is not None and (not format.has_unused or part is not None):
        raise CheckpointError(f"the unused group has no place in {format.name!r} with part={part!r}; leave it out")
    beside = [key for key in source.keys() if not key.startswith("llm.")]  # noqa: SIM118
    if format.is_text_only and beside:
        raise CheckpointError(
            f"format {format.name!r} holds a language model alone, but there is also {beside[0]!r} (and "
            f"{len(beside) - 1} more); pass part='llm' to leave them out"
        )
