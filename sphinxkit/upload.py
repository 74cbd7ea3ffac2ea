"""The way of small numbers to a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def upload(values: Tensor | Sequence[Any], device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of the host on a device, without waiting for what the device still has to do.

    ``torch.tensor(values, device="cuda")`` and ``to("cuda")`` wait until all that is queued has run. This does not:
    memory that is not pinned is read before the call returns, so the source may go or change afterwards.

    Args:
        values: A tensor, or numbers.
        device: Where they are wanted.
        dtype: None: the tensor's, or torch's default for the numbers.
    Source: CUDA's API synchronization behavior, cudaMemcpyAsync from pageable memory.
    """
    return torch.as_tensor(values, dtype=dtype).to(device, non_blocking=True)
