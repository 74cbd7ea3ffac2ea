"""Writing a ``torch.save`` file tensor by tensor.

``torch.save`` wants every tensor of a file at once. Its zip layout does not: a small pickle that names the storages,
then one uncompressed record per storage. Written here with the standard library alone, so that one tensor is in
memory at a time; ``torch.load`` reads the result with and without mmap.

Source: PyTorch, docs/source/notes/serialization.rst (records, 64-byte alignment, byteorder and version records).
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from sphinxkit.checkpoint.safetensors import TensorSpec, tensor_bytes
from sphinxkit.errors import CheckpointError

_STORAGES: dict[torch.dtype, type] = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}
_ALIGNMENT = 64  # torch's own, so that mapped tensors are aligned
_LOCAL_HEADER = 30  # fixed part of a zip entry's header
_ZIP64_EXTRA = 20  # what zipfile adds for sizes beyond 4 GiB
_PADDING_FIELD = 0x4246  # "FB", the extra-field id that torch pads with
_CHUNK = 16 * 2**20
_ROOT = "archive"


class _Storage:
    def __init__(self, key: str, spec: TensorSpec) -> None:
        self.key = key
        self.spec = spec


class _Stub:
    """Pickles as a tensor whose storage is named but not there."""

    def __init__(self, storage: _Storage) -> None:
        self.storage = storage

    def __reduce__(self) -> tuple[Any, ...]:
        shape = self.storage.spec.shape
        stride = [1] * len(shape)
        for index in range(len(shape) - 2, -1, -1):
            stride[index] = stride[index + 1] * max(shape[index + 1], 1)
        arguments: tuple[Any, ...] = (self.storage, 0, shape, tuple(stride), False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Storage):
            numel = obj.spec.num_bytes // obj.spec.dtype.itemsize
            return ("storage", _STORAGES[obj.spec.dtype], obj.key, "cpu", numel)
        return None


class TorchFileWriter:
    """Writes ``{"model": {name: tensor}}``, or the bare dictionary, one tensor at a time in the announced order.

    A context manager: the file is complete when the block is left.

    Args:
        path: File to write; use it inside :func:`sphinxkit.atomic.atomic_directory`.
        specs: Every tensor, in the order in which ``write`` will be called.
        wrapper: Key to put around the tensors; None for none.
    Raises:
        CheckpointError: A dtype that torch files written here cannot hold.
    """

    def __init__(self, path: Path, specs: Sequence[TensorSpec], wrapper: str | None = None) -> None:
        for spec in specs:
            if spec.dtype not in _STORAGES:
                raise CheckpointError(f"{path}: {spec.name!r} is {spec.dtype}, which cannot be written to .pth")
        self._path = path
        self._specs = list(specs)
        self._wrapper = wrapper
        self._written = 0

    def __enter__(self) -> TorchFileWriter:
        stubs: Any = {spec.name: _Stub(_Storage(str(index), spec)) for index, spec in enumerate(self._specs)}
        pickled = io.BytesIO()
        _Pickler(pickled, protocol=2).dump({self._wrapper: stubs} if self._wrapper else stubs)
        self._file = self._path.open("wb")
        try:
            self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED, allowZip64=True)
            self._record("data.pkl", memoryview(pickled.getvalue()))
            self._record("byteorder", memoryview(b"little"))
        except BaseException:
            self._give_up()
            raise
        return self

    def _give_up(self) -> None:
        with suppress(Exception):  # what went wrong first is what counts
            self._zip.close()
        self._file.close()

    def _record(self, name: str, data: memoryview) -> None:
        info = zipfile.ZipInfo(f"{_ROOT}/{name}")
        start = self._file.tell() + _LOCAL_HEADER + len(info.filename) + _ZIP64_EXTRA + 4
        padding = -start % _ALIGNMENT
        info.extra = struct.pack("<HH", _PADDING_FIELD, padding) + b"Z" * padding
        with self._zip.open(info, "w", force_zip64=True) as record:
            for begin in range(0, len(data), _CHUNK):
                record.write(data[begin : begin + _CHUNK])

    def write(self, tensor: Tensor) -> None:
        """Write the next announced tensor.

        Args:
            tensor: On the CPU, of the announced shape and dtype.
        Raises:
            CheckpointError: It is not what was announced.
        """
        spec = self._specs[self._written]
        if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
            raise CheckpointError(
                f"{self._path}: {spec.name!r} was announced as {list(spec.shape)} {spec.dtype} but is "
                f"{list(tensor.shape)} {tensor.dtype}"
            )
        self._record(f"data/{self._written}", tensor_bytes(tensor))
        self._written += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_complete = self._written == len(self._specs)
        if kind is not None or not is_complete:
            self._give_up()
        if kind is None and not is_complete:
            raise CheckpointError(f"{self._path}: {self._written} of {len(self._specs)} announced tensors were written")
        if kind is None:
            try:
                self._record("version", memoryview(b"3\n"))
                self._zip.close()
            except BaseException:
                self._give_up()
                raise
            self._file.close()
