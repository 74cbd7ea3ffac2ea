"""Tensors that lie in files and are read one at a time, when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from sphinxkit.errors import CheckpointError
from sphinxkit.registry import suggest


class LazyTensor(Protocol):
    """One tensor in files: its shape and dtype are known, its data is read on demand."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Stored dtype."""
        ...

    @property
    def stored_bytes(self) -> int:
        """Bytes that reading it takes from the files."""
        ...

    def read(self) -> Tensor:
        """The whole tensor on the CPU: a view of mapped memory where possible, not to be written to."""
        ...

    def copy_into(self, out: Tensor) -> None:
        """Write the tensor into ``out``, converting to its device and dtype, with no copy in between.

        Shape:
            out: as ``shape``
        """
        ...


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in one file, known by its header alone; a :class:`LazyTensor`.

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

    @property
    def stored_bytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor, not to be written to."""
        return self.view()

    def copy_into(self, out: Tensor) -> None:
        """Copy the tensor into ``out``.

        Shape:
            out: as ``shape``
        """
        out.copy_(self.view())


T = TypeVar("T", bound=LazyTensor)


class LazySource(Generic[T]):
    """A :class:`~sphinxkit.tensor_source.TensorSource` over tensors in files; a context manager that closes it.

    Args:
        tensors: Name to tensor, in order.
        label: Where they come from, for messages.
    """

    def __init__(self, tensors: Mapping[str, T], label: str) -> None:
        self._tensors = dict(tensors)
        self._label = label
        self._closed = False

    def _tensor(self, key: str) -> T:
        if self._closed:
            raise CheckpointError(f"{self._label} is closed; read before leaving the with block")
        if key not in self._tensors:
            raise CheckpointError(f"{self._label} holds no tensor {key!r}{suggest(key, self._tensors)}")
        return self._tensors[key]

    def keys(self) -> Iterable[str]:
        """Names, in the files' order."""
        return self._tensors.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __getitem__(self, key: str) -> Tensor:
        return self.read(key)

    def __contains__(self, key: object) -> bool:
        return key in self._tensors

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of the whole tensor ``key``; CheckpointError if there is none."""
        return self._tensor(key).shape

    def dtype(self, key: str) -> torch.dtype:
        """Stored dtype of ``key``; CheckpointError if there is none."""
        return self._tensor(key).dtype

    def num_bytes(self, key: str) -> int:
        """Size of the whole tensor ``key`` in bytes; CheckpointError if there is none."""
        tensor = self._tensor(key)
        return math.prod(tensor.shape) * tensor.dtype.itemsize

    def read(self, key: str) -> Tensor:
        """The whole tensor on the CPU in its stored dtype; do not write to it.

        Raises:
            CheckpointError: Unknown key, closed source, or copies that differ between shards.
        """
        return self._tensor(key).read()

    def read_into(self, key: str, out: Tensor) -> None:
        """Copy the whole tensor into ``out``, converting to its device and dtype, with no copy in between.

        Args:
            key: Name.
            out: The tensor to fill.
        Shape:
            out: ``shape(key)``
        Raises:
            CheckpointError: As ``read``, or ``out`` has another shape.
        """
        tensor = self._tensor(key)
        if tuple(out.shape) != tensor.shape:
            raise CheckpointError(f"{self._label}: {key!r} is {list(tensor.shape)}, asked for {list(out.shape)}")
        tensor.copy_into(out)

    def close(self) -> None:
        """Let go of the mapped files; tensors that were read stay valid."""
        self._closed = True
        self._tensors = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
