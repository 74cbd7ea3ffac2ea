"""Tensors on disk by key, many to a file, written by many processes at once."""

from __future__ import annotations

import struct
import uuid
import zlib
from pathlib import Path

import torch
from torch import Tensor

from sphinxkit.tensor_files.spec import tensor_bytes
from sphinxkit.training.errors import named_errors

KEY_BYTES = 16
SHARD_BYTES = 2**30  # a shard is ended behind this size; our choice
ENTRY = struct.Struct("<16sQIIB")  # key, offset, bytes, CRC-32, dtype
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class FeatureShards:
    """Tensors under keys of 16 bytes in a folder of shards.

    A shard is ``NAME.data`` and ``NAME.keys``. Each process appends to shards of its own, first data, then the entry in
    ``.keys``, so a killed one leaves no half tensor. Entries of other processes are seen after ``refresh``. A tensor
    that is cut or damaged counts as not found.

    Args:
        folder: May be shared by runs and processes; made by the first write.
    Raises:
        TrainingError: Its entries cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries: dict[bytes, list[tuple[Path, int, int, int, int]]] = {}
        self._read: dict[Path, int] = {}  # bytes of each .keys file that have been read
        self._own: Path | None = None
        self._mine: set[Path] = set()  # .keys files that this one writes
        self.refresh()

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def refresh(self) -> None:
        """Read the entries that other processes have written since.

        Raises:
            TrainingError: They cannot be read.
        """
        for path in self.folder.glob("*.keys"):
            if path in self._mine:
                continue
            with named_errors(path, "read"), path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                content = file.read()
            whole = len(content) // ENTRY.size * ENTRY.size
            for key, *place in ENTRY.iter_unpack(content[:whole]):
                self._entries.setdefault(key, []).append((path.with_suffix(".data"), *place))
            self._read[path] = self._read.get(path, 0) + whole

    def get(self, key: bytes) -> Tensor | None:
        """The tensor, flat, or None.

        Args:
            key: 16 bytes.
        Shape:
            return: (N,)
        """
        found = (self._load(*entry) for entry in self._entries.get(key, ()))
        return next((tensor for tensor in found if tensor is not None), None)

    @staticmethod
    def _load(path: Path, offset: int, size: int, checksum: int, dtype: int) -> Tensor | None:
        content = bytearray(size)
        try:
            with path.open("rb") as file:
                file.seek(offset)
                is_whole = file.readinto(content) == size
        except OSError:
            return None
        return torch.frombuffer(content, dtype=_DTYPES[dtype]) if is_whole and zlib.crc32(content) == checksum else None

    def add(self, key: bytes, tensor: Tensor) -> None:
        """Append a tensor.

        Args:
            key: 16 bytes.
            tensor: On the CPU, not empty, float32, bfloat16, float16 or float64.
        Shape:
            tensor: any
        Raises:
            TrainingError: The disk is full or fails.
        """
        if self._own is None:
            with named_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            self._own = self.folder / f"{uuid.uuid4().hex}.data"
            self._mine.add(self._own.with_suffix(".keys"))
        data = tensor_bytes(tensor)
        with named_errors(self._own), self._own.open("ab") as file:
            offset = file.tell()
            file.write(data)
        place = (offset, len(data), zlib.crc32(data), _DTYPES.index(tensor.dtype))
        keys = self._own.with_suffix(".keys")
        with named_errors(keys), keys.open("ab") as file:
            file.write(ENTRY.pack(key, *place))
        self._entries.setdefault(key, []).append((self._own, *place))
        if offset + len(data) > SHARD_BYTES:
            self._own = None
