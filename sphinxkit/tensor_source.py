"""Protocol of named tensors: between readers (checkpoints) and users (loading, mixing)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sphinxkit.errors import CheckpointError


@runtime_checkable
class TensorSource(Protocol):
    """Named tensors, readable one at a time; names, shapes and dtypes are known without reading any data."""

    def keys(self) -> Iterable[str]:
        """Names, in a fixed order."""
        ...

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        ...

    def dtype(self, key: str) -> torch.dtype:
        """Stored dtype of one tensor."""
        ...

    def read(self, key: str) -> Tensor:
        """One tensor on the CPU in its stored dtype; may be a view of mapped memory and must not be written to."""
        ...


class MappingSource:
    """Tensors that are already in memory, such as a state dict, as a :class:`TensorSource`.

    Args:
        tensors: Name to tensor, on any device; ``read`` gives them on the CPU, detached.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    def keys(self) -> Iterable[str]:
        """Names, in the mapping's order."""
        return self._tensors.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return tuple(self._tensors[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of one tensor."""
        return self._tensors[key].dtype

    def read(self, key: str) -> Tensor:
        """One tensor on the CPU; shares memory with the mapping's tensor when that is on the CPU.

        Raises:
            CheckpointError: The tensor is on the meta device, which holds no values.
        """
        tensor = self._tensors[key]
        if tensor.is_meta:
            raise CheckpointError(
                f"{key!r} is on the meta device: the model has no weights yet, load or make them first"
            )
        return tensor.detach().cpu()


class ModuleSource(MappingSource):
    """A module's parameters and persistent buffers as a :class:`TensorSource`, under its own names.

    A tensor with several names (tied embeddings) appears once, under the first.

    Args:
        module: On any device but meta; its tensors are not copied.
    """

    def __init__(self, module: nn.Module) -> None:
        names: dict[int, str] = {}
        tensors = module.state_dict(keep_vars=True)
        super().__init__({name: each for name, each in tensors.items() if names.setdefault(id(each), name) == name})


@runtime_checkable
class ChunkedSource(TensorSource, Protocol):
    """A source that can give a tensor piece by piece, so that a writer never holds it whole."""

    def chunks(self, key: str) -> Iterator[Tensor]:
        """One tensor as flat pieces in row-major order, each like ``read`` otherwise."""
        ...


class PrefixedSource:
    """The tensors of a source with a prefix before their names, such as those of a part in the whole model.

    Args:
        source: The source.
        prefix: Prefix of every name.
    """

    def __init__(self, source: TensorSource, prefix: str) -> None:
        self._source = source
        self._prefix = prefix

    def keys(self) -> Iterable[str]:
        """Names with the prefix, in the source's order."""
        return [f"{self._prefix}{key}" for key in self._source.keys()]  # noqa: SIM118 - a TensorSource is no mapping

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self._source.shape(key.removeprefix(self._prefix))

    def dtype(self, key: str) -> torch.dtype:
        """Stored dtype of one tensor."""
        return self._source.dtype(key.removeprefix(self._prefix))

    def read(self, key: str) -> Tensor:
        """One tensor on the CPU in its stored dtype; do not write to it."""
        return self._source.read(key.removeprefix(self._prefix))
