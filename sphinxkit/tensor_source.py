"""The protocol between whoever reads tensors by name (checkpoints) and whoever works on them (loading, mixing)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


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
