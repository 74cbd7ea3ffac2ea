"""What every format's writer does: files are laid out from shapes, then filled tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sphinxkit.checkpoint.keymap import KeyMap, NameRule
from sphinxkit.checkpoint.sharding import shard_shape, take_shard
from sphinxkit.errors import CheckpointError
from sphinxkit.tensor_files.safetensors import write_safetensors
from sphinxkit.tensor_files.spec import TensorSpec, WrittenFile
from sphinxkit.tensor_files.torch_zip import TorchFileWriter
from sphinxkit.tensor_source import ChunkedSource, TensorSource

Progress = Callable[[str, int], None]
"""Called with the name of a tensor that was read and its size in bytes."""

Texts = dict[str, str]
"""Name -> content of small files."""


Convert = Callable[[Tensor], Tensor]
"""From a canonical tensor to the one that a format stores."""


@dataclass(frozen=True)
class Piece:
    """One tensor as it will be written.

    Attributes:
        spec: Its name and shape in the file.
        key: Its canonical name.
        split_dim: Dimension that shards split; None: each holds all of it.
        convert: Applied to the canonical tensor; None: nothing is.
    """

    spec: TensorSpec
    key: str
    split_dim: int | None = None
    convert: Convert | None = None

    def read(self, source: TensorInput | _LastRead) -> Tensor:
        """The whole tensor as the format has it. Shape: that of ``spec``, unsplit."""
        tensor = source.read(self.key)
        return self.convert(tensor) if self.convert else tensor

    def chunks(self, source: TensorInput | _LastRead) -> Iterator[Tensor]:
        """The same as flat pieces in row-major order. Shape: (n,) each."""
        return iter([self.read(source)]) if self.convert else source.chunks(self.key)


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


class _LastRead:
    """An input that keeps the last tensor it read, where it is one of experts that are written one by one."""

    def __init__(self, source: TensorInput) -> None:
        self._source = source
        self._held: dict[str, Tensor] = {}

    def read(self, key: str) -> Tensor:
        if ".experts." not in key:
            return self._source.read(key)
        if key not in self._held:
            self._held.clear()  # before the next one is read
            self._held[key] = self._source.read(key)
        return self._held[key]

    def chunks(self, key: str) -> Iterator[Tensor]:
        return self._source.chunks(key)


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
    is_delta: bool = False
    tokenizer: Mapping[str, bytes] = field(default_factory=dict)
    files_of: Path | None = None


def pieces_of(
    source: TensorInput,
    key_map: KeyMap,
    count: int = 1,
    conversion: Callable[[NameRule], Convert | None] = lambda rule: None,
) -> list[Piece]:
    """What a format's files will hold, under its names.

    Args:
        source: Tensors to save.
        key_map: The format's names.
        count: Number of shards.
        conversion: What is done to the tensors that a rule names.
    Raises:
        CheckpointError: Tensors without a name in the format, or that cannot be split evenly.
    """
    pieces: list[Piece] = []
    unknown: list[str] = []
    for key in source.keys():  # noqa: SIM118
        found = key_map.to_theirs(key)
        if found is None:
            unknown.append(key)
            continue
        name, rule = found
        shape = shard_shape(source.shape(key), rule.split_dim, count, name)
        if rule.is_flat:
            shape = (shape[0] * shape[1], *shape[2:])
        pieces.append(Piece(TensorSpec(name, shape, source.dtype(key)), key, rule.split_dim, conversion(rule)))
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} tensors have no name in this format, {unknown[0]!r} for one; use sphinxkit's own format"
        )
    return pieces


def write_torch_shards(
    paths: Sequence[Path],
    source: TensorInput,
    pieces: Sequence[Piece],
    unused: TensorInput | None,
    wrapper: str | None,
) -> None:
    """Write all shards side by side: every tensor is read once, and each shard gets its slice.

    Args:
        paths: One file a shard.
        source: Tensors to save.
        pieces: What the files will hold.
        unused: Tensors that every shard gets whole, under their own names.
        wrapper: Key to put around the tensors; None for none.
    """
    carried = [] if unused is None else specs_of(unused)
    specs = [piece.spec for piece in pieces] + carried
    with ExitStack() as stack:
        writers = [stack.enter_context(TorchFileWriter(path, specs, wrapper)) for path in paths]
        for piece in pieces:
            tensor = piece.read(source)
            for rank, writer in enumerate(writers):
                writer.write(take_shard(tensor, piece.split_dim, len(writers), rank).reshape(piece.spec.shape))
            del tensor  # before the next one is read
        if unused is not None:
            for spec in carried:
                tensor = unused.read(spec.name)
                for writer in writers:
                    writer.write(tensor)
                del tensor


def write_safetensors_shards(
    folder: Path,
    source: TensorInput,
    pieces: Sequence[Piece],
    max_shard_bytes: int,
    checksum: bool,
    stem: str = "model",
) -> tuple[dict[str, str], dict[str, WrittenFile]]:
    """Write one file, or several files where it would grow too large.

    Args:
        folder: Where to.
        source: Tensors to save.
        pieces: What the files will hold.
        max_shard_bytes: Size at which another file starts.
        checksum: Whether to compute SHA-256 sums on the way.
        stem: First word of the files' names.
    Returns:
        Tensor -> file; file -> what was written.
    """
    groups: list[list[Piece]] = [[]]
    filled = 0
    for piece in pieces:
        if groups[-1] and filled + piece.spec.num_bytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(piece)
        filled += piece.spec.num_bytes
    inputs = _LastRead(source)  # several pieces may be parts of one tensor
    weight_map: dict[str, str] = {}
    written: dict[str, WrittenFile] = {}
    for index, group in enumerate(groups, start=1):
        single = len(groups) == 1
        name = f"{stem}.safetensors" if single else f"{stem}-{index:05d}-of-{len(groups):05d}.safetensors"
        by_name = {piece.spec.name: piece for piece in group}

        def read(tensor_name: str, by_name: dict[str, Piece] = by_name) -> Tensor:
            return by_name[tensor_name].read(inputs)

        def chunks(tensor_name: str, by_name: dict[str, Piece] = by_name) -> Iterator[Tensor]:
            return by_name[tensor_name].chunks(inputs)

        specs = [p.spec for p in group]
        written[name] = write_safetensors(folder / name, specs, read, checksum=checksum, chunks=chunks)
        weight_map |= dict.fromkeys(by_name, name)
    return weight_map, written


def json_text(content: Any) -> str:
    """``content`` as the JSON that goes into a small file."""
    return json.dumps(content, indent=1) + "\n"
