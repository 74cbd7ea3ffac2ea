"""Base of attention backends: the pattern of a forward pass, the interface and the registry.

An ``AttentionPattern`` describes a forward pass. From it, ``prepare`` makes the backend's state (a mask, an xformers
bias) once, and every layer passes that to ``attend``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sphinxkit.llama.cache import CacheWrite
from sphinxkit.registry import Registry
from sphinxkit.to_device import to_device

HALF_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPattern:
    """Which keys each query of one forward pass attends to.

    - neither ``seq_lens`` nor ``write``: causal over each row.
    - ``seq_lens``: one row of packed samples, causal within each.
    - ``write``: query j of row i is at position ``starts[i] + j`` and attends to the cache's slots up to there.

    With a ``window``, a query attends to at most that many keys: its own and those just before it.

    Args:
        batch_size: Rows, B.
        width: Queries of a row, S.
        device: Where queries and keys are.
        seq_lens: Lengths of the packed samples; they sum to S.
        write: Places in a cache whose slots are the keys. None for the first pass into an empty cache, whose keys are
            the pass's own.
        window: Maximum number of keys per query; None: no limit.
    """

    batch_size: int
    width: int
    device: torch.device
    seq_lens: tuple[int, ...] | None = None
    write: CacheWrite | None = None
    window: int | None = None

    def is_token(self) -> bool:
        """Whether this is a decoding step: one token for each row, over a cache."""
        return self.write is not None and self.width == 1

    def mask(self) -> Tensor:
        """Dense boolean form, True where a query sees a key: (1 or B, 1, S, T), T the keys that the pass looks at."""
        columns = torch.arange(self.width, device=self.device)
        if self.write is not None:
            queries = (self.write.starts[:, None] + columns)[:, :, None]
            keys = torch.arange(self.write.num_keys, device=self.device)
            seen = keys <= queries
            return (seen if self.window is None else seen & (keys > queries - self.window))[:, None]
        causal = columns <= columns[:, None]
        if self.window is not None:
            causal = causal & (columns > columns[:, None] - self.window)
        if self.seq_lens is not None:
            sample = torch.arange(len(self.seq_lens), device=self.device)
            sample = sample.repeat_interleave(to_device(self.seq_lens, self.device), output_size=sum(self.seq_lens))
            causal = causal & (sample == sample[:, None])
        return causal[None, None]


class AttentionBackend(ABC):
    """One way to compute softmax(q k^T / sqrt(D)) v with grouped heads."""

    name: str

    def resolve(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, window: int | None = None
    ) -> AttentionBackend:
        """The backend that will run on this device and dtype, in a window if one is given; raises where it cannot.

        Raises:
            RegistryError: The backend cannot run there; the message says what was tried.
        """
        return self

    def prepare(self, pattern: AttentionPattern, dtype: torch.dtype) -> Any:
        """What ``attend`` needs of a pattern for queries of ``dtype``, built once a pass and shared by all layers."""
        return None

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, state: Any) -> Tensor:
        """Attention of one layer.

        Args:
            q: Queries.
            k: Keys; with ``pattern.write`` the cache's, else the pass's own.
            v: Values.
            pattern: Which keys each query attends to.
            state: Result of ``prepare`` for this pattern.
        Shape:
            q: (B, H, S, D)
            k, v: (B, Hkv, T, D); query heads h*H/Hkv ... (h+1)*H/Hkv - 1 share key head h
            return: (B, H, S, D)
        """


def repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """Repeat each key or value head for the query heads that share it: (B, Hkv, T, D) -> (B, num_heads, T, D)."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], dim=1)


registry: Registry[AttentionBackend] = Registry("attention backend")
