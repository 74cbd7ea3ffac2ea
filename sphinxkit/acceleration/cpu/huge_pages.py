"""CPU memory in large pages, for weights that every decoding step reads from end to end."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

_PAGE_BYTES = 2 << 20  # of a large page on x86-64, and on ARM with small pages of 4 KiB
_MIN_BYTES = 2 * _PAGE_BYTES  # less cannot gain; our choice


class Region:
    """Memory on the CPU that several tensors share, in large pages where the system gives them.

    A matrix-vector product walks through all weights. With pages of 4 KiB it waits for one address translation after
    the other; in large ones the products of a 220 M LLaMA in bfloat16 took 5 to 8 % less time. Linux gives them to
    whoever asks (setting ``madvise``, the usual one); elsewhere this is ordinary memory.

    Args:
        num_elements: How many numbers.
        dtype: Of the numbers.
    """

    def __init__(self, num_elements: int, dtype: torch.dtype) -> None:
        self._dtype = dtype
        num_bytes = num_elements * dtype.itemsize
        flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        self._memory = mmap.mmap(-1, num_bytes + _PAGE_BYTES, **flags)
        if num_bytes >= _MIN_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them: it is ordinary memory then
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._start = -torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr() % _PAGE_BYTES

    def tensor(self, start: int, num_elements: int) -> Tensor:
        """A tensor over a part of the memory, which lives as long as one of them does.

        Each has a storage of its own that covers this part and no more. So a tensor that shares its memory with a
        larger one is copied, pickled and saved by itself.

        Args:
            start: First element.
            num_elements: How many, at least 1.
        Shape:
            return: (num_elements,), its contents undefined
        """
        offset = self._start + start * self._dtype.itemsize
        return torch.frombuffer(self._memory, dtype=self._dtype, count=num_elements, offset=offset)


def empty(num_elements: int, dtype: torch.dtype) -> Tensor:
    """Memory for a flat tensor on the CPU, in large pages where the system gives them.

    Args:
        num_elements: How many, at least 1.
        dtype: Of the elements.
    Shape:
        return: (num_elements,), its contents undefined; it starts at the beginning of a page
    """
    return Region(num_elements, dtype).tensor(0, num_elements)
