"""Asking the operating system for mapped memory before it is touched."""

from __future__ import annotations

import contextlib
import mmap

from torch import Tensor

_MADV_WILLNEED = getattr(mmap, "MADV_WILLNEED", None)


def will_need(tensor: Tensor) -> None:
    """Start reading the file pages behind a CPU tensor, without waiting; does nothing for other memory.

    Only advice (``madvise`` with ``MADV_WILLNEED``): contents never change, and where the system has no such call,
    nothing happens.

    Args:
        tensor: Contiguous.
    Shape:
        tensor: any
    """
    if _MADV_WILLNEED is None or tensor.device.type != "cpu" or not tensor.numel():
        return
    import ctypes

    start = tensor.data_ptr() & -mmap.PAGESIZE
    length = tensor.data_ptr() + tensor.numel() * tensor.element_size() - start
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_WILLNEED)
