"""The files of ``torch.save``: read mapped and never executed, written tensor by tensor.

``weights_only=True`` holds everywhere: a pickle that asks for anything but tensors and plain containers is refused by
torch's own restricted unpickler before it can run. Files in torch's zip layout are mapped; older ones cannot be and
are read whole.

``torch.save`` wants every tensor of a file at once. Its zip layout does not: a small pickle that names the storages,
then one uncompressed record per storage. Written here with the standard library alone, so that one tensor is in
memory at a time; ``torch.load`` reads the result with and without mmap.

Source: PyTorch, docs/source/notes/serialization.rst (records, 64-byte alignment, byteorder and version records).
"""

from __future__ import annotations

import io
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from sphinxkit.errors import CheckpointError
from sphinxkit.tensor_files.checksums import Check
from sphinxkit.tensor_files.lazy import StoredTensor
from sphinxkit.tensor_files.mapped import MappedFile
from sphinxkit.tensor_files.spec import TensorSpec, tensor_bytes

_ZIP_MAGIC = b"PK\x03\x04"
_RECORD_HEADER = struct.Struct("<26xHH")  # of a zip record: it ends with the lengths of its name and extra field
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


def read_torch_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file; a single ``model`` or ``state_dict`` level around them is looked through.

    Args:
        path: A ``.pth`` or ``.bin`` file.
    Raises:
        CheckpointError: The file is empty, truncated, damaged, holds code, or holds something else than tensors.
    """
    loaded, mapped = _load(path)
    for wrapper in ("model", "state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
            break
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, expected a dictionary of tensors")
    stored: dict[str, StoredTensor] = {}
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout is not torch.strided:
            raise CheckpointError(f"{path}: entry {name!r} is a {type(value).__name__}, expected a dense tensor")
        tensor = value.detach()
        stored[name] = StoredTensor(path, name, tuple(tensor.shape), tensor.dtype, partial(_itself, tensor, mapped))
    if not stored:
        raise CheckpointError(f"{path}: holds no tensors")
    return stored


def _itself(tensor: Tensor, mapped: MappedFile | None) -> Tensor:
    if mapped is not None:
        mapped.check()
    return tensor


def _load(path: Path) -> tuple[Any, MappedFile | None]:
    """What the file holds; the file itself, if the tensors are views of it."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            magic = file.read(len(_ZIP_MAGIC))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if size == 0:
        raise CheckpointError(f"{path}: the file is empty; fetch it again")
    is_zip = magic == _ZIP_MAGIC
    try:
        if is_zip:
            _refuse_compressed(path)
        mapped = MappedFile(path, size) if is_zip else None
        return torch.load(path, map_location="cpu", mmap=is_zip or None, weights_only=True), mapped
    except Exception as error:  # a damaged pickle can raise anything at all
        raise CheckpointError(_explain(path, size, error)) from error


def _refuse_compressed(path: Path) -> None:
    """``torch.save`` compresses nothing; what is compressed could unfold to any size."""
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise zipfile.BadZipFile(f"record {info.filename} is compressed")


def _explain(path: Path, size: int, error: Exception) -> str:
    text = str(error)
    asked = re.search(r"(?:GLOBAL|global:?|class|function) ([\w.]+\.[\w.]+)", text)
    if "Weights only load failed" in text and asked and "nsupported" in text:
        return (
            f"{path}: refused: its pickle asks for {asked.group(1)}, which is code and not tensors; nothing of it was "
            "executed. Get the file from a source you trust, saved as tensors only"
        )
    first = text.strip().splitlines()[0] if text.strip() else "no reason given"
    return (
        f"{path}: not a readable torch file ({size} bytes; {type(error).__name__}: {first[:200]}): truncated, damaged "
        "or of another kind; fetch it again"
    )


def zip_checks(path: Path) -> list[Check]:
    """The CRC-32 of every record of a torch file; none for torch's older layout, which stores no checksums.

    Raises:
        CheckpointError: The list of records is damaged.
    """
    if not zipfile.is_zipfile(path):
        return []
    checks = []
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for info in archive.infolist():
                if info.compress_type != zipfile.ZIP_STORED:
                    raise zipfile.BadZipFile(f"record {info.filename} is compressed")
                file.seek(info.header_offset)
                name_length, extra_length = _RECORD_HEADER.unpack(file.read(_RECORD_HEADER.size))
                begin = info.header_offset + _RECORD_HEADER.size + name_length + extra_length
                message = f"{path}: record {info.filename} does not match its checksum"
                checks.append(Check(path, begin, begin + info.file_size, "crc32", f"{info.CRC:08x}", message))
    except (OSError, ValueError, struct.error, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: its list of records is damaged: {error}; fetch the file again") from error
    return checks


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
        Shape:
            tensor: as announced
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
