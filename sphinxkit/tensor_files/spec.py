"""Names, shapes and dtypes of tensors to write, what was written, and the bytes of a tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of a tensor that is about to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class WrittenFile:
    """What a writer made: size in bytes and, if asked for, the SHA-256 in hex (else empty)."""

    size: int
    sha256: str


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of a CPU tensor in row-major order; no copy if it is contiguous.

    Shape:
        tensor: any
    """
    flat = tensor.detach().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")
