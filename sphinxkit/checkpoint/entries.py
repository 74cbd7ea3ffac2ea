"""Tensors that lie in files, possibly in slices, and their lazy reading under one name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sphinxkit.errors import CheckpointError
from sphinxkit.registry import suggest

Replicas = Literal["equal", "first"]
"""What to do with a tensor that every shard holds whole: insist that the copies are equal, or take the first one."""

_MAX_LISTED = 50  # faults named one by one in a message; our choice
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in one file, known by its header alone.

    Attributes:
        file: The file it lies in.
        name: Its name in that file.
        shape: Its shape in that file.
        dtype: Its stored dtype.
        view: Gives the tensor as a view of mapped memory (of memory, for files that cannot be mapped).
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    view: Callable[[], Tensor]


def raise_faults(what: str, faults: Sequence[str]) -> None:
    """Raise one error that lists ``faults``; nothing happens when there are none.

    Args:
        what: Start of the message: the file or folder and what is wrong with it.
        faults: One line each; more than fifty are cut short, with their number.
    Raises:
        CheckpointError: ``faults`` is not empty.
    """
    if faults:
        listed = "".join(f"\n  - {fault}" for fault in faults[:_MAX_LISTED])
        rest = len(faults) - _MAX_LISTED
        raise CheckpointError(f"{what}:{listed}" + (f"\n  ... and {rest} more" if rest > 0 else ""))


def bitwise_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits (NaN equals itself, -0.0 is not 0.0)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype.is_complex:
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    bits = _BITS[a.element_size()]
    return torch.equal(a.view(bits), b.view(bits))


class Entry:
    """One tensor made of the slices that the shards of a checkpoint hold.

    Args:
        parts: One per shard, in order.
        dim: Dimension the slices are concatenated along; None: every part is the whole tensor.
        reorder: Applied to the whole tensor when it is read (the rotary permutation of Hugging Face files).
        replicas: See :data:`Replicas`; looked at when the tensor is read.
    Raises:
        CheckpointError: The parts differ in dtype or shape, or have no dimension ``dim``.
    """

    def __init__(
        self,
        parts: Sequence[StoredTensor],
        dim: int | None = None,
        reorder: Callable[[Tensor], Tensor] | None = None,
        replicas: Replicas = "equal",
    ) -> None:
        first = parts[0]
        for part in parts[1:]:
            if part.shape != first.shape or part.dtype != first.dtype:
                raise CheckpointError(
                    f"{part.file}: {part.name!r} is {_describe(part)}, but {_describe(first)} in {first.file.name}: "
                    "the shards are not of one checkpoint"
                )
        shape = list(first.shape)
        if dim is not None and len(parts) > 1:
            if dim >= len(shape):
                raise CheckpointError(f"{first.file}: {first.name!r} is {_describe(first)}, it has no dimension {dim}")
            shape[dim] *= len(parts)
        self.parts = tuple(parts)
        self.stored_bytes = sum(math.prod(part.shape) * part.dtype.itemsize for part in parts)
        self.dim = dim if len(parts) > 1 else None
        self.shape = tuple(shape)
        self.dtype = first.dtype
        self._reorder = reorder
        self._replicas = replicas

    def _check_replicas(self) -> None:
        if self._replicas == "first" or self.dim is not None or len(self.parts) == 1:
            return
        first = self.parts[0].view()
        for part in self.parts[1:]:
            if not bitwise_equal(first, part.view()):
                raise CheckpointError(
                    f"{part.file}: {part.name!r} should be the same in every shard but differs from "
                    f"{self.parts[0].file.name}; pass replicas='first' (--replicas first) to take the first shard's"
                )

    def read(self) -> Tensor:
        """The whole tensor: a view of mapped memory, or one new tensor where slices are joined.

        Raises:
            CheckpointError: Copies of one tensor differ between shards.
        """
        self._check_replicas()
        if self.dim is None:
            tensor = self.parts[0].view()
        else:
            tensor = torch.cat([part.view() for part in self.parts], dim=self.dim)
        return self._reorder(tensor) if self._reorder else tensor

    def copy_into(self, out: Tensor) -> None:
        """Write the tensor into ``out`` (its device and dtype), slice by slice, without a joined copy in between.

        Raises:
            CheckpointError: Copies of one tensor differ between shards.
        """
        if self.dim is None or self._reorder:
            out.copy_(self.read())
            return
        width = self.parts[0].shape[self.dim]
        for index, part in enumerate(self.parts):
            out.narrow(self.dim, index * width, width).copy_(part.view())


def _describe(part: StoredTensor) -> str:
    return f"{list(part.shape)} {str(part.dtype).removeprefix('torch.')}"


class EntrySource:
    """A :class:`~sphinxkit.tensor_source.TensorSource` over entries.

    Args:
        entries: Name to entry, in order.
        label: Where they come from, for messages.
    """

    def __init__(self, entries: Mapping[str, Entry], label: str) -> None:
        self._entries = dict(entries)
        self._label = label
        self._closed = False

    def _entry(self, key: str) -> Entry:
        if self._closed:
            raise CheckpointError(f"{self._label} is closed; read before leaving the with block")
        if key not in self._entries:
            raise CheckpointError(f"{self._label} holds no tensor {key!r}{suggest(key, self._entries)}")
        return self._entries[key]

    def keys(self) -> Iterable[str]:
        """Names, in the files' order."""
        return self._entries.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __getitem__(self, key: str) -> Tensor:
        return self.read(key)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of the whole tensor ``key``; CheckpointError if there is none."""
        return self._entry(key).shape

    def dtype(self, key: str) -> torch.dtype:
        """Stored dtype of ``key``; CheckpointError if there is none."""
        return self._entry(key).dtype

    def num_bytes(self, key: str) -> int:
        """Size of the whole tensor ``key`` in bytes; CheckpointError if there is none."""
        entry = self._entry(key)
        return math.prod(entry.shape) * entry.dtype.itemsize

    def read(self, key: str) -> Tensor:
        """The whole tensor on the CPU in its stored dtype; do not write to it.

        Raises:
            CheckpointError: Unknown key, closed source, or copies that differ between shards.
        """
        return self._entry(key).read()

    def read_into(self, key: str, out: Tensor) -> None:
        """Copy the whole tensor into ``out``, converting to its device and dtype, with no copy in between.

        Args:
            key: Name.
            out: Tensor of exactly ``shape(key)``.
        Raises:
            CheckpointError: As ``read``, or ``out`` has another shape.
        """
        entry = self._entry(key)
        if tuple(out.shape) != entry.shape:
            raise CheckpointError(f"{self._label}: {key!r} is {list(entry.shape)}, asked for {list(out.shape)}")
        entry.copy_into(out)

    def close(self) -> None:
        """Let go of the mapped files; tensors that were read stay valid."""
        self._closed = True
        self._entries = {}
