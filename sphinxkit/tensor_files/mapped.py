"""One mapping of a file of tensors, which notices when the file is cut short.

Reading mapped memory beyond a file's end kills the process (SIGBUS), so the length of the open file is looked at each
time a tensor is taken. What happens between that and the last byte's copy is not seen.
"""

from __future__ import annotations

import mmap
import os
import weakref
from pathlib import Path

import torch
from torch import Tensor

from sphinxkit.errors import CheckpointError


class MappedFile:
    """An open file of known length; mapped at first use, and shared by the views of its tensors.

    Args:
        path: The file.
        size: Its length when its header was read.
    Raises:
        CheckpointError: It cannot be opened.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._size = size
        self._bytes: Tensor | None = None
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        weakref.finalize(self, os.close, self._descriptor)

    def check(self) -> None:
        """Raise if the file is shorter than it was.

        Raises:
            CheckpointError: It is.
        """
        size = os.fstat(self._descriptor).st_size
        if size < self._size:
            raise CheckpointError(
                f"{self._path}: was cut short while it was in use: {size} of {self._size} bytes are left; another "
                "program writes to it, or it is being fetched again"
            )

    def view(self, begin: int, end: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """A tensor as a view of mapped memory, not to be written to.

        Args:
            begin: First byte in the file.
            end: Byte after the last.
            dtype: Its dtype; where its data is not aligned, the tensor is a copy.
            shape: Its shape.
        Shape:
            return: ``shape``
        Raises:
            CheckpointError: The file was cut short.
        """
        self.check()
        if self._bytes is None:
            mapping = mmap.mmap(self._descriptor, self._size, access=mmap.ACCESS_COPY)
            self._bytes = torch.frombuffer(mapping, dtype=torch.uint8)
        raw = self._bytes[begin:end]
        if begin % dtype.itemsize:
            raw = raw.clone()  # legal in the format, but torch wants aligned data
        return raw.view(dtype).view(shape)
