"""Sources of tensors put together and picked apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sphinxkit.errors import CheckpointError
from sphinxkit.interpolation.stream import MixedSource
from sphinxkit.tensor_source import TensorSource


class JoinedSource:
    """Several sources with different names, as one.

    Args:
        parts: In order.
        select: Whether a name is in; None takes all.
    Raises:
        CheckpointError: A name occurs twice.
    """

    def __init__(self, parts: Sequence[TensorSource], select: Callable[[str], bool] | None = None) -> None:
        self._owners: dict[str, TensorSource] = {}
        for part in parts:
            for key in filter(select, part.keys()) if select else part.keys():
                if key in self._owners:
                    raise CheckpointError(f"two sources that are to be joined both hold {key!r}")
                self._owners[key] = part

    def _owner(self, key: str) -> TensorSource:
        if key not in self._owners:
            raise CheckpointError(f"no source holds {key!r}")
        return self._owners[key]

    def keys(self) -> Iterable[str]:
        """Names of all parts, in order."""
        return self._owners.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of ``key``; CheckpointError if no part holds it."""
        return self._owner(key).shape(key)

    def dtype(self, key: str) -> torch.dtype:
        """Stored dtype of ``key``; CheckpointError if no part holds it."""
        return self._owner(key).dtype(key)

    def read(self, key: str) -> Tensor:
        """The tensor ``key``; CheckpointError if no part holds it."""
        return self._owner(key).read(key)


@dataclass(frozen=True)
class SelectedSource:
    """Some tensors of a source.

    Attributes:
        source: Where they come from.
        select: Whether a name is in.
    """

    source: MixedSource
    select: Callable[[str], bool]

    def keys(self) -> Iterable[str]:
        """The selected names, in the source's order."""
        return [key for key in self.source.keys() if self.select(key)]  # noqa: SIM118

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of ``key``."""
        return self.source.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of ``key``."""
        return self.source.dtype(key)

    def read(self, key: str) -> Tensor:
        """The whole tensor ``key``."""
        return self.source.read(key)

    def read_into(self, key: str, out: Tensor) -> None:
        """Write the tensor ``key`` into ``out``; see :meth:`MixedSource.read_into`.

        Shape:
            out: ``shape(key)``
        """
        self.source.read_into(key, out)

    def chunks(self, key: str) -> Iterator[Tensor]:
        """The tensor ``key`` in flat pieces; see :meth:`MixedSource.chunks`."""
        return self.source.chunks(key)
