"""Fingerprints of the models that took part in a mix, independent of how their files are laid out."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class ContentHash:
    """SHA-256 over the tensors of one model that took part in a mix.

    Attributes:
        tensors: How many.
        sha256: Hash, in hex, of one line ``name dtype shape sha256-of-bytes`` per tensor, in the order of the names;
            None if no tensor took part.
    """

    tensors: int
    sha256: str | None


class Hasher:
    """Hashes tensors in a thread of its own while their pages are at hand.

    Args:
        num_sources: How many models there are.
        wanted: True, or the indices of the models to hash.
    """

    def __init__(self, num_sources: int, wanted: bool | Collection[int] = True) -> None:
        self._wanted = set(range(num_sources) if isinstance(wanted, bool) else wanted)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sphinxkit-hash")
        self._lines: list[dict[str, str]] = [{} for _ in range(num_sources)]
        self._done: deque[Future[None]] = deque()

    def wait(self) -> None:
        """Wait for what was started, so that no earlier tensor is held in memory for its hash."""
        while self._done:
            self._done.popleft().result()

    def start(self, key: str, parts: Mapping[int, Tensor]) -> None:
        """Start to hash one tensor of some models, unless that has been done.

        Args:
            key: Its name.
            parts: Model index -> tensor, not to be changed until :meth:`wait`.
        Shape:
            parts: all the same, any
        """
        for index, part in parts.items():
            if index in self._wanted and key not in self._lines[index]:
                self._lines[index][key] = ""
                self._done.append(self._pool.submit(self._hash, index, key, part))

    def _hash(self, index: int, key: str, part: Tensor) -> None:
        data = hashlib.sha256(part.reshape(-1).view(torch.uint8).numpy().data)
        shape = "x".join(map(str, part.shape))
        self._lines[index][key] = f"{key} {str(part.dtype).removeprefix('torch.')} {shape} {data.hexdigest()}\n"

    def results(self) -> list[ContentHash]:
        """One hash per model, once everything started is done."""
        self.wait()
        hashes = []
        for lines in self._lines:
            whole = hashlib.sha256("".join(lines[key] for key in sorted(lines)).encode()).hexdigest()
            hashes.append(ContentHash(len(lines), whole if lines else None))
        return hashes
