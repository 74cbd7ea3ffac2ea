"""Copies small host data to a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(values: Tensor | Sequence[Any], device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Copy host data to a device without synchronising with the device.

    ``torch.tensor(values, device="cuda")`` and ``to("cuda")`` wait until all queued work has run. A copy from pageable
    memory need not wait: the source is read before the call returns, so it may change afterwards. All other copies
    (from pinned memory, or from a device) wait as ``to`` does.

    Args:
        values: A tensor, or numbers.
        device: Target device.
        dtype: None: the tensor's; of numbers int64, bool, or float32 whatever torch's default is.
    Shape:
        values, return: any
    Source: CUDA's API synchronization behavior, cudaMemcpyAsync from pageable memory.
    """
    if isinstance(values, Tensor):
        given = values if dtype is None else values.to(dtype)
    else:
        given = torch.as_tensor(values, dtype=dtype, device="cpu")
        if dtype is None and given.is_floating_point():
            given = torch.as_tensor(values, dtype=torch.float32, device="cpu")
    return given.to(device, non_blocking=given.device.type == "cpu" and not given.is_pinned())
