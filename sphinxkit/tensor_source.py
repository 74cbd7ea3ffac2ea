"""Protocol of named tensors: between readers (checkpoints) and users (loading, mixing)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
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


class NamedSource:
    """Tensors of one source or several, under names of its own.

    Args:
        tensors: Name -> the source that holds the tensor, and its name there.
    """

    def __init__(self, tensors: Mapping[str, tuple[TensorSource, str]]) -> None:
        self._tensors = dict(tensors)

    def _find(self, key: str) -> tuple[TensorSource, str]:
        if key not in self._tensors:
            raise CheckpointError(f"no source holds {key!r}")
        return self._tensors[key]

    def keys(self) -> Iterable[str]:
        """The names, in order."""
        return self._tensors.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor; CheckpointError for an unknown name."""
        source, name = self._find(key)
        return source.shape(name)

    def dtype(self, key: str) -> torch.dtype:
        """Stored dtype of one tensor; CheckpointError for an unknown name."""
        source, name = self._find(key)
        return source.dtype(name)

    def read(self, key: str) -> Tensor:
        """One tensor on the CPU in its stored dtype, do not write to it; CheckpointError for an unknown name."""
        source, name = self._find(key)
        return source.read(name)

    def among(self, names: Collection[str]) -> NamedSource:
        """The tensors whose name is in ``names``."""
        return NamedSource({key: place for key, place in self._tensors.items() if key in names})

    def below(self, prefix: str) -> NamedSource:
        """The tensors below a prefix, named without it."""
        return NamedSource(
            {key.removeprefix(prefix): place for key, place in self._tensors.items() if key.startswith(prefix)}
        )


def prefixed(source: TensorSource, prefix: str) -> NamedSource:
    """The tensors of a source with a prefix before their names, such as those of a part in the whole model."""
    return NamedSource({f"{prefix}{key}": (source, key) for key in source.keys()})  # noqa: SIM118 - no mapping


def joined(parts: Iterable[TensorSource], select: Callable[[str], bool] | None = None) -> NamedSource:
    """Several sources with different names, as one.

    Args:
        parts: In order.
        select: Whether a name is in; None takes all.
    Raises:
        CheckpointError: A name occurs twice.
    """
    found: dict[str, tuple[TensorSource, str]] = {}
    for part in parts:
        for key in filter(select, part.keys()) if select else part.keys():
            if key in found:
                raise CheckpointError(f"two sources that are to be joined both hold {key!r}")
            found[key] = part, key
    return NamedSource(found)
