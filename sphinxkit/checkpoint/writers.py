"""Each format's writer: what its files hold, planned from shapes and then streamed tensor by tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sphinxkit.checkpoint.encoders_json import encoders_json
from sphinxkit.checkpoint.hf import CONFIG_NAME, hf_from_numbers
from sphinxkit.checkpoint.keymap import KeyMap, hf_key_map, meta_key_map, sphinx_key_map
from sphinxkit.checkpoint.lla2acc import SHARD_NAME, type_of_vision
from sphinxkit.checkpoint.llm_config import full_numbers, meta_from_numbers
from sphinxkit.checkpoint.meta import META_SHARD_NAME, PARAMS_NAME
from sphinxkit.checkpoint.native import FORMAT_NAME, FORMAT_VERSION, INDEX_NAME, RECIPE_NAME, UNUSED_NAME
from sphinxkit.checkpoint.sharding import rotary_to_halves, shard_shape, take_shard
from sphinxkit.checkpoint.tokenizer_file import TOKENIZER_NAME
from sphinxkit.errors import CheckpointError
from sphinxkit.tensor_files.safetensors import write_safetensors
from sphinxkit.tensor_files.spec import TensorSpec, WrittenFile
from sphinxkit.tensor_files.torch_zip import TorchFileWriter
from sphinxkit.tensor_source import ChunkedSource, TensorSource

_MAX_SEQ_LEN = 4096  # default of the llama builders

Progress = Callable[[str, int], None]
"""Called with the name of a tensor that was read and its size in bytes."""

Texts = dict[str, str]
"""Name -> content of small files."""


@dataclass(frozen=True)
class _Piece:
    """One tensor as it will be written: its name and shape there, and how to get it."""

    spec: TensorSpec
    key: str
    split_dim: int | None
    convert: Callable[[Tensor], Tensor] | None


class TensorInput:
    """The tensors that are saved: a part of a source, cast on the way; a TensorSource itself.

    Args:
        source: Where they come from.
        part: First word of the names to take ("llm"); None takes all.
        dtype: For every floating-point tensor; None keeps each one's.
        progress: Told of every tensor that was read.
    """

    def __init__(
        self, source: TensorSource, part: str | None, dtype: torch.dtype | None, progress: Progress | None
    ) -> None:
        self._source = source
        self._dtype = dtype
        self._progress = progress
        self._keys = [key for key in source.keys() if part is None or key.startswith(f"{part}.")]  # noqa: SIM118

    def keys(self) -> Iterable[str]:
        """Names of the part, in the source's order."""
        return self._keys

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return tuple(self._source.shape(key))

    def dtype(self, key: str) -> torch.dtype:
        """Dtype that it will be written in."""
        stored = self._source.dtype(key)
        return self._dtype if self._dtype is not None and stored.is_floating_point else stored

    def read(self, key: str) -> Tensor:
        """One tensor on the CPU, cast."""
        tensor = self._source.read(key).to(self.dtype(key))
        if self._progress is not None:
            self._progress(key, tensor.numel() * tensor.element_size())
        return tensor

    def chunks(self, key: str) -> Iterator[Tensor]:
        """One tensor as flat pieces in row-major order, cast: the source's own pieces if it has such, else one."""
        if not isinstance(self._source, ChunkedSource):
            yield self.read(key).reshape(-1)
            return
        dtype, size = self.dtype(key), 0
        for piece in self._source.chunks(key):
            yield piece.to(dtype)
            size += piece.numel() * dtype.itemsize
        if self._progress is not None:
            self._progress(key, size)


def specs_of(source: TensorInput) -> list[TensorSpec]:
    """Name, shape and dtype of every tensor that a source will give."""
    return [TensorSpec(key, source.shape(key), source.dtype(key)) for key in source.keys()]  # noqa: SIM118


@dataclass(frozen=True)
class WriteOptions:
    """What :func:`sphinxkit.checkpoint.save` was told about the format; see there."""

    recipe: Mapping[str, Any] | None
    recipe_yaml: str | None
    num_shards: int
    max_shard_bytes: int
    checksum: bool
    kind: str
    tokenizer: bytes | None = None


def _pieces(source: TensorInput, key_map: KeyMap, count: int, reorder: Mapping[str, int] | None = None) -> list[_Piece]:
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
    paths: Sequence[Path],
    source: TensorInput,
    pieces: Sequence[_Piece],
    unused: TensorInput | None,
    wrapper: str | None,
) -> None:
    """All shards side by side: every tensor is read once, and each shard gets its slice."""
    carried = [] if unused is None else specs_of(unused)
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
    folder: Path, source: TensorInput, pieces: Sequence[_Piece], options: WriteOptions, checksum: bool
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

        def chunks(tensor_name: str, by_name: dict[str, _Piece] = by_name) -> Iterator[Tensor]:
            piece = by_name[tensor_name]
            if piece.convert:
                yield piece.convert(source.read(piece.key))
            else:
                yield from source.chunks(piece.key)

        specs = [p.spec for p in group]
        written[name] = write_safetensors(folder / name, specs, read, checksum=checksum, chunks=chunks)
        weight_map |= dict.fromkeys(by_name, name)
    return weight_map, written


def _json(content: Any) -> str:
    return json.dumps(content, indent=1) + "\n"


def write_native(
    folder: Path, source: TensorInput, unused: TensorInput | None, options: WriteOptions
) -> dict[str, str]:
    """Write tensors in sphinxkit's own layout into ``folder``; gives the small text files that go beside them."""
    pieces = [_Piece(spec, spec.name, None, None) for spec in specs_of(source)]
    weight_map, written = _write_safetensors_shards(folder, source, pieces, options, options.checksum)
    if unused is not None:
        written[UNUSED_NAME] = write_safetensors(
            folder / UNUSED_NAME, specs_of(unused), unused.read, checksum=options.checksum, chunks=unused.chunks
        )
    recipe_yaml = options.recipe_yaml
    if recipe_yaml is None and options.recipe is not None:
        import yaml

        recipe_yaml = yaml.safe_dump(dict(options.recipe), sort_keys=False)
    texts = {} if recipe_yaml is None else {RECIPE_NAME: recipe_yaml}
    small = {name: text.encode() for name, text in texts.items()}
    if options.tokenizer is not None:
        small[TOKENIZER_NAME] = options.tokenizer
    for name, content in small.items():
        written[name] = WrittenFile(len(content), hashlib.sha256(content).hexdigest() if options.checksum else "")
    metadata = {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "total_size": sum(piece.spec.num_bytes for piece in pieces),
        "files": {
            name: {"size": file.size, **({"sha256": file.sha256} if file.sha256 else {})}
            for name, file in written.items()
        },
    }
    return {INDEX_NAME: _json({"metadata": metadata, "weight_map": weight_map}), **texts}


def _numbers(source: TensorInput, options: WriteOptions, format: str) -> dict[str, Any]:
    if options.recipe is None or "llm" not in options.recipe:
        raise CheckpointError(f"format {format!r} writes the model's numbers beside it; pass recipe= (--recipe)")
    return full_numbers(options.recipe["llm"], source)


def write_released(
    folder: Path, source: TensorInput, unused: TensorInput | None, options: WriteOptions
) -> dict[str, str]:
    """Write tensors in the released SPHINX layout into ``folder``; gives the small text files that go beside them."""
    numbers = _numbers(source, options, "sphinx")
    vision = options.recipe.get("vision") if options.recipe else None
    texts = {"meta.json": _json({"llama_type": type_of_vision(vision)}), CONFIG_NAME: _json(meta_from_numbers(numbers))}
    encoders = None if vision is None else encoders_json(vision)
    if encoders is not None:
        texts["encoders.json"] = _json(encoders)
    count = options.num_shards
    pieces = _pieces(source, sphinx_key_map(vision), count)
    paths = [folder / SHARD_NAME.format(rank, count, options.kind) for rank in range(count)]
    _write_torch_shards(paths, source, pieces, unused, "model")
    return texts


def write_meta(folder: Path, source: TensorInput, unused: TensorInput | None, options: WriteOptions) -> Texts:
    """Write tensors in Meta's layout into ``folder``; gives the small text files that go beside them."""
    numbers = _numbers(source, options, "meta")
    count = options.num_shards
    paths = [folder / META_SHARD_NAME.format(rank) for rank in range(count)]
    _write_torch_shards(paths, source, _pieces(source, meta_key_map(), count), unused, None)
    return {PARAMS_NAME: _json(meta_from_numbers(numbers))}


def write_hf(folder: Path, source: TensorInput, unused: TensorInput | None, options: WriteOptions) -> Texts:
    """Write tensors in Hugging Face's layout into ``folder``; gives the small text files that go beside them."""
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
