"""Writing a checkpoint in any format: planned from shapes, then streamed tensor by tensor into a new folder."""

from __future__ import annotations

import errno
import fnmatch
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sphinxkit.atomic import atomic_directory
from sphinxkit.checkpoint.hf import CONFIG_NAME, hf_from_numbers
from sphinxkit.checkpoint.keymap import KeyMap, hf_key_map, meta_key_map, sphinx_key_map
from sphinxkit.checkpoint.lla2acc import SHARD_NAME, encoders_json, type_of_vision
from sphinxkit.checkpoint.llm_numbers import full_numbers, meta_from_numbers
from sphinxkit.checkpoint.meta import META_SHARD_NAME, PARAMS_NAME
from sphinxkit.checkpoint.native import FORMAT_NAME, FORMAT_VERSION, INDEX_NAME, RECIPE_NAME, UNUSED_NAME
from sphinxkit.checkpoint.opening import FORMATS, Format
from sphinxkit.checkpoint.pickle_writer import TorchFileWriter
from sphinxkit.checkpoint.reader import Checkpoint
from sphinxkit.checkpoint.safetensors import TensorSpec, WrittenFile, write_safetensors
from sphinxkit.checkpoint.sharding import rotary_to_halves, shard_shape, take_shard
from sphinxkit.checkpoint.tokenizer_file import TOKENIZER_NAME
from sphinxkit.errors import CheckpointError
from sphinxkit.tensor_source import TensorSource

MAX_SHARD_BYTES = 5 * 10**9  # Hugging Face's habit
_SPARE_BYTES = 2**20  # headers and small files beside the tensors; our choice
_OURS = ("*.safetensors", "*.index.json", "*.pth", "*.bin", RECIPE_NAME, TOKENIZER_NAME, "config.json", "meta.json",
         PARAMS_NAME, "encoders.json", "provenance.json")  # fmt: skip
_MAX_SEQ_LEN = 4096

Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class _Piece:
    """One tensor as it will be written: its name and shape there, and how to get it."""

    spec: TensorSpec
    key: str
    split_dim: int | None
    convert: Callable[[Tensor], Tensor] | None


class _Input:
    """The tensors that are saved: a part of a source, cast on the way."""

    def __init__(
        self, source: TensorSource, part: str | None, dtype: torch.dtype | None, progress: Progress | None
    ) -> None:
        self._source = source
        self._dtype = dtype
        self._progress = progress
        self._keys = [key for key in source.keys() if part is None or key.startswith(f"{part}.")]  # noqa: SIM118

    def keys(self) -> Iterable[str]:
        return self._keys

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._source.shape(key))

    def dtype(self, key: str) -> torch.dtype:
        stored = self._source.dtype(key)
        return self._dtype if self._dtype is not None and stored.is_floating_point else stored

    def read(self, key: str) -> Tensor:
        tensor = self._source.read(key).to(self.dtype(key))
        if self._progress is not None:
            self._progress(key, tensor.numel() * tensor.element_size())
        return tensor


def save(
    path: str | Path,
    source: TensorSource,
    *,
    format: Format = "sphinxkit",
    part: Literal["llm"] | None = None,
    num_shards: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtype: torch.dtype | None = None,
    recipe: Mapping[str, Any] | None = None,
    recipe_yaml: str | None = None,
    tokenizer: str | Path | bytes | None = None,
    unused: TensorSource | None = None,
    extra_files: Mapping[str, str] | None = None,
    checksum: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a checkpoint folder, tensor by tensor; it appears whole or not at all.

    Args:
        path: Folder to make.
        source: Tensors in canonical names: an opened checkpoint, or ``MappingSource(model.state_dict())``.
        format: "sphinxkit", "sphinx" (the released layout), "meta" or "hf".
        part: "llm" writes the language model alone, as a text-only checkpoint; "meta" and "hf" hold nothing else.
        num_shards: Tensor-parallel parts of "sphinx" and "meta" (default 1).
        max_shard_bytes: Size at which "sphinxkit" and "hf" start another file; a larger tensor has one for itself.
        dtype: Casts every floating-point tensor, the unused group's too; None keeps them.
        recipe: The model's recipe (a dictionary); None takes an opened checkpoint's own. "sphinx", "meta" and "hf"
            write their configuration from it.
        recipe_yaml: Text for ``recipe.yaml`` ("sphinxkit" only); None writes ``recipe``.
        tokenizer: Path or content of ``tokenizer.model``.
        unused: The unused group of a released checkpoint, to be carried along ("sphinxkit" and "sphinx").
        extra_files: Name -> text of small files to put beside (``provenance.json``).
        checksum: Whether to store SHA-256 sums ("sphinxkit" only); they are computed while writing.
        overwrite: Whether an existing checkpoint folder may be replaced. Folders with anything else in them never are.
        progress: Called with key and bytes for every tensor that was read.
    Returns:
        ``path``.
    Raises:
        CheckpointError: The folder exists, the format cannot hold these tensors or lacks a number it needs, or the
            disk is full; nothing is left behind.
    """
    target = Path(path)
    if format not in FORMATS:
        raise CheckpointError(f"unknown checkpoint format {format!r}; known: {', '.join(FORMATS)}")
    _check_target(target, overwrite)
    if recipe is None and isinstance(source, Checkpoint) and source.has_recipe:
        recipe = source.recipe
    if recipe is not None and part == "llm":
        recipe = {key: value for key, value in recipe.items() if key != "vision"}
    chosen = _Input(source, part, dtype, progress)
    carried = None if unused is None else _Input(unused, None, dtype, progress)
    if carried is not None and not carried.keys():
        carried = None
    _check_contents(target, chosen, carried, format, part, num_shards)
    num_bytes = sum(spec.num_bytes for part_ in (chosen, carried) if part_ is not None for spec in _specs(part_))
    writer = {"sphinxkit": _write_native, "sphinx": _write_released, "meta": _write_meta, "hf": _write_hf}[format]
    options = _Options(recipe, recipe_yaml, num_shards or 1, max_shard_bytes, checksum)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if num_bytes + _SPARE_BYTES > free:
            raise CheckpointError(f"{target}: needs {num_bytes / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free")
        with atomic_directory(target) as folder:
            for name, text in writer(folder, chosen, carried, options).items():
                (folder / name).write_text(text, encoding="utf-8")
            for name, text in (extra_files or {}).items():
                (folder / name).write_text(text, encoding="utf-8")
            if tokenizer is not None:
                content = tokenizer if isinstance(tokenizer, bytes) else Path(tokenizer).read_bytes()
                (folder / TOKENIZER_NAME).write_bytes(content)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(f"{target}: the disk is full; nothing was left behind") from error
        raise CheckpointError(f"{target}: cannot be written: {error}") from error
    return target


def _specs(source: _Input) -> list[TensorSpec]:
    return [TensorSpec(key, source.shape(key), source.dtype(key)) for key in source.keys()]  # noqa: SIM118


@dataclass(frozen=True)
class _Options:
    recipe: Mapping[str, Any] | None
    recipe_yaml: str | None
    num_shards: int
    max_shard_bytes: int
    checksum: bool


def _check_target(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target}: is a file; a checkpoint is a folder")
    names = sorted(item.name for item in target.iterdir()) if target.exists() else []
    foreign = [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in _OURS)]
    if foreign:
        raise CheckpointError(
            f"{target}: the folder holds {', '.join(foreign[:5])}, which no checkpoint has; it will not be replaced"
        )
    if names and not overwrite:
        raise CheckpointError(f"{target}: exists already; pass overwrite=True to replace it")


def _check_contents(
    target: Path, source: _Input, unused: _Input | None, format: str, part: str | None, num_shards: int | None
) -> None:
    if not source.keys():
        raise CheckpointError(f"{target}: there is nothing to save" + (f" in part {part!r}" if part else ""))
    if num_shards is not None and (num_shards < 1 or format not in ("sphinx", "meta")):
        raise CheckpointError(f"num_shards={num_shards}: a positive number, for the formats 'sphinx' and 'meta' only")
    if unused is not None and (format in ("meta", "hf") or part is not None):
        raise CheckpointError(f"the unused group has no place in {format!r} with part={part!r}; leave it out")
    beside = [key for key in source.keys() if not key.startswith("llm.")]  # noqa: SIM118
    if format in ("meta", "hf") and beside:
        raise CheckpointError(
            f"format {format!r} holds a language model alone, but there is also {beside[0]!r} (and {len(beside) - 1} "
            "more); pass part='llm' to leave them out"
        )


def _pieces(source: _Input, key_map: KeyMap, count: int, reorder: Mapping[str, int] | None = None) -> list[_Piece]:
    """What a format's files will hold, under its names."""
    pieces: list[_Piece] = []
    unknown: list[str] = []
    for key in source.keys():  # noqa: SIM118
        found = key_map.to_theirs(key)
        if found is None:
            unknown.append(key)
            continue
        name, rule = found
        convert = None
        if rule.rotary is not None and reorder is not None:
            heads = reorder[rule.rotary]

            def convert(tensor: Tensor, heads: int = heads) -> Tensor:
                return rotary_to_halves(tensor, heads)

        shape = shard_shape(source.shape(key), rule.split_dim, count, name)
        pieces.append(_Piece(TensorSpec(name, shape, source.dtype(key)), key, rule.split_dim, convert))
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} tensors have no name in this format, {unknown[0]!r} for one; use sphinxkit's own format"
        )
    return pieces


def _write_torch_shards(
    paths: Sequence[Path], source: _Input, pieces: Sequence[_Piece], unused: _Input | None, wrapper: str | None
) -> None:
    """All shards side by side: every tensor is read once, and each shard gets its slice."""
    carried = [] if unused is None else _specs(unused)
    specs = [piece.spec for piece in pieces] + carried
    with ExitStack() as stack:
        writers = [stack.enter_context(TorchFileWriter(path, specs, wrapper)) for path in paths]
        for piece in pieces:
            tensor = source.read(piece.key)
            for rank, writer in enumerate(writers):
                writer.write(take_shard(tensor, piece.split_dim, len(writers), rank))
            del tensor  # before the next one is read
        if unused is not None:
            for spec in carried:
                tensor = unused.read(spec.name)
                for writer in writers:
                    writer.write(tensor)
                del tensor


def _write_safetensors_shards(
    folder: Path, source: _Input, pieces: Sequence[_Piece], options: _Options, checksum: bool
) -> tuple[dict[str, str], dict[str, WrittenFile]]:
    """Tensor -> file, and what was written."""
    groups: list[list[_Piece]] = [[]]
    filled = 0
    for piece in pieces:
        if groups[-1] and filled + piece.spec.num_bytes > options.max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(piece)
        filled += piece.spec.num_bytes
    weight_map: dict[str, str] = {}
    written: dict[str, WrittenFile] = {}
    for index, group in enumerate(groups, start=1):
        single = len(groups) == 1
        name = "model.safetensors" if single else f"model-{index:05d}-of-{len(groups):05d}.safetensors"
        by_name = {piece.spec.name: piece for piece in group}

        def read(tensor_name: str, by_name: dict[str, _Piece] = by_name) -> Tensor:
            piece = by_name[tensor_name]
            tensor = source.read(piece.key)
            return piece.convert(tensor) if piece.convert else tensor

        written[name] = write_safetensors(folder / name, [p.spec for p in group], read, checksum=checksum)
        weight_map |= dict.fromkeys(by_name, name)
    return weight_map, written


def _json(content: Any) -> str:
    return json.dumps(content, indent=1) + "\n"


def _write_native(folder: Path, source: _Input, unused: _Input | None, options: _Options) -> dict[str, str]:
    pieces = [_Piece(spec, spec.name, None, None) for spec in _specs(source)]
    weight_map, written = _write_safetensors_shards(folder, source, pieces, options, options.checksum)
    if unused is not None:
        written[UNUSED_NAME] = write_safetensors(
            folder / UNUSED_NAME, _specs(unused), unused.read, checksum=options.checksum
        )
    metadata = {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "total_size": sum(piece.spec.num_bytes for piece in pieces),
        "files": {
            name: {"size": file.size, **({"sha256": file.sha256} if file.sha256 else {})}
            for name, file in written.items()
        },
    }
    texts = {INDEX_NAME: _json({"metadata": metadata, "weight_map": weight_map})}
    recipe_yaml = options.recipe_yaml
    if recipe_yaml is None and options.recipe is not None:
        import yaml

        recipe_yaml = yaml.safe_dump(dict(options.recipe), sort_keys=False)
    if recipe_yaml is not None:
        texts[RECIPE_NAME] = recipe_yaml
    return texts


def _numbers(source: _Input, options: _Options, format: str) -> dict[str, Any]:
    if options.recipe is None or "llm" not in options.recipe:
        raise CheckpointError(f"format {format!r} writes the model's numbers beside it; pass recipe=")
    return full_numbers(options.recipe["llm"], source)


def _write_released(folder: Path, source: _Input, unused: _Input | None, options: _Options) -> dict[str, str]:
    numbers = _numbers(source, options, "sphinx")
    vision = options.recipe.get("vision") if options.recipe else None
    texts = {"meta.json": _json({"llama_type": type_of_vision(vision)}), CONFIG_NAME: _json(meta_from_numbers(numbers))}
    encoders = None if vision is None else encoders_json(vision)
    if encoders is not None:
        texts["encoders.json"] = _json(encoders)
    count = options.num_shards
    pieces = _pieces(source, sphinx_key_map(vision), count)
    paths = [folder / SHARD_NAME.format(rank, count, "model") for rank in range(count)]
    _write_torch_shards(paths, source, pieces, unused, "model")
    return texts


def _write_meta(folder: Path, source: _Input, unused: _Input | None, options: _Options) -> dict[str, str]:
    numbers = _numbers(source, options, "meta")
    count = options.num_shards
    paths = [folder / META_SHARD_NAME.format(rank) for rank in range(count)]
    _write_torch_shards(paths, source, _pieces(source, meta_key_map(), count), unused, None)
    return {PARAMS_NAME: _json(meta_from_numbers(numbers))}


def _write_hf(folder: Path, source: _Input, unused: _Input | None, options: _Options) -> dict[str, str]:
    del unused  # checked before: there is none
    numbers = _numbers(source, options, "hf")
    heads = {"query": numbers["num_heads"], "key": numbers["num_kv_heads"]}
    pieces = _pieces(source, hf_key_map(), 1, heads)
    weight_map, written = _write_safetensors_shards(folder, source, pieces, options, checksum=False)
    llm = options.recipe["llm"] if options.recipe else {}
    dtype = str(source.dtype("llm.embed_tokens.weight")).removeprefix("torch.")
    texts = {CONFIG_NAME: _json(hf_from_numbers(numbers, llm.get("max_seq_len", _MAX_SEQ_LEN), dtype))}
    if len(written) > 1:
        total = sum(piece.spec.num_bytes for piece in pieces)
        texts["model.safetensors.index.json"] = _json({"metadata": {"total_size": total}, "weight_map": weight_map})
    return texts
