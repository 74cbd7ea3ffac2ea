"""The safetensors layout, read lazily from mapped files and written tensor by tensor.

Eight bytes hold the length of a JSON header, the header names each tensor's dtype, shape and byte range, raw
little-endian data follows. Reading here checks all of that against the file's size before any tensor is touched, so a
truncated or edited file is an error when it is opened.

Source: the format's description, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sphinxkit.errors import CheckpointError
from sphinxkit.tensor_files.lazy import StoredTensor
from sphinxkit.tensor_files.mapped import MappedFile
from sphinxkit.tensor_files.spec import TensorSpec, WrittenFile, tensor_bytes

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's dtype names that torch has on every supported version."""

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # the format's own limit
_CHUNK = 16 * 2**20  # bytes written and hashed at a time; our choice


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise CheckpointError(f"{path}: not a safetensors file, or cut off inside its header ({size} bytes)")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the safetensors header is damaged: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is damaged: it is not an object")
    return header, 8 + length, size


def read_safetensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of one file, none of them read yet, and the header's text metadata.

    Args:
        path: A ``.safetensors`` file.
    Returns:
        Tensors by name, in the order of their data; metadata.
    Raises:
        CheckpointError: Not a safetensors file, a header that does not fit itself, or a file of another size than its
            header says (truncated, tampered with).
    """
    header, start, size = _header(path)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: __metadata__ in the header is {type(metadata).__name__}, expected an object")
    mapped = MappedFile(path, size)
    placed: list[tuple[int, int, StoredTensor]] = []
    for name, info in header.items():
        try:
            dtype, shape = DTYPES[info["dtype"]], tuple(int(n) for n in info["shape"])
            begin, end = (int(n) for n in info["data_offsets"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"{path}: header entry {name!r} cannot be used: {error!r}") from error
        if min(shape, default=0) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
            raise CheckpointError(f"{path}: {name!r} is {list(shape)} {dtype} but has {end - begin} bytes")
        view = partial(mapped.view, start + begin, start + end, dtype, shape)
        placed.append((begin, end, StoredTensor(path, name, shape, dtype, view)))
    placed.sort(key=lambda item: item[:2])
    position = 0
    for begin, end, stored in placed:
        if begin != position:
            raise CheckpointError(f"{path}: the data of {stored.name!r} starts at {begin}, expected {position}")
        position = end
    if start + position != size:
        raise CheckpointError(
            f"{path}: the header describes {start + position} bytes, the file has {size}: truncated or tampered with; "
            "fetch it again"
        )
    return {stored.name: stored for _, _, stored in placed}, {str(k): str(v) for k, v in metadata.items()}


def start_writeback(file: BinaryIO, offset: int, num_bytes: int) -> None:
    """Let the system send written bytes to the disk now, without waiting for it.

    Otherwise they pile up in memory until the final flush, which then takes as long as everything before it.
    POSIX_FADV_DONTNEED starts that for pages that are not on the disk yet (and cannot drop them before).

    Args:
        file: Open for writing.
        offset: Of the bytes in the file.
        num_bytes: How many.
    Source: Linux, mm/fadvise.c.
    """
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError, AttributeError):  # only advice: some files take none
            os.posix_fadvise(file.fileno(), offset, num_bytes, os.POSIX_FADV_DONTNEED)


class HashingFile:
    """Writes to a file and, in a second thread, hashes the same bytes.

    Args:
        file: Open for writing in binary.
        checksum: Whether to hash at all.
    """

    def __init__(self, file: BinaryIO, checksum: bool) -> None:
        self._file = file
        self._hash = hashlib.sha256() if checksum else None
        self._pool = ThreadPoolExecutor(1) if checksum else None
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append ``data``."""
        view = memoryview(data)
        for begin in range(0, len(view), _CHUNK):
            chunk = view[begin : begin + _CHUNK]
            if self._hash is None or self._pool is None:
                self._file.write(chunk)
            else:
                hashing = self._pool.submit(self._hash.update, chunk)
                try:
                    self._file.write(chunk)
                finally:
                    hashing.result()
            start_writeback(self._file, self.size + begin, len(chunk))
        self.size += len(view)

    def close(self) -> WrittenFile:
        """Stop hashing; the file itself stays open."""
        if self._pool is not None:
            self._pool.shutdown()
        return WrittenFile(self.size, self._hash.hexdigest() if self._hash else "")


def write_safetensors(
    path: Path,
    specs: Sequence[TensorSpec],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
    checksum: bool = True,
    chunks: Callable[[str], Iterator[Tensor]] | None = None,
) -> WrittenFile:
    """Write one file, tensor by tensor; one tensor is in memory at a time, or with ``chunks`` a few pieces of it.

    Args:
        path: File to write; use it inside :func:`sphinxkit.atomic.atomic_directory`.
        specs: What will be written. Data is laid out widest dtype first, so that every tensor is aligned.
        read: Gives the tensor of a name, in the spec's shape and dtype.
        metadata: Text for the header.
        checksum: Whether to hash the file as it is written.
        chunks: Used instead of ``read`` where given: flat pieces of the tensor in row-major order.
    Shape:
        read: as the spec of the name
        chunks: (n,) each, together the spec's elements
    Raises:
        CheckpointError: A dtype that the format does not have, or ``read`` gives another shape or dtype.
    """
    ordered = sorted(specs, key=lambda spec: -spec.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for spec in ordered:
        if spec.dtype not in _DTYPE_NAMES:
            raise CheckpointError(f"{path}: {spec.name!r} is {spec.dtype}, which safetensors does not store here")
        end = position + spec.num_bytes
        header[spec.name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, end],
        }
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        output = HashingFile(file, checksum)
        try:
            output.write(struct.pack("<Q", len(encoded)) + encoded)
            for spec in ordered:
                if chunks is not None:
                    _write_pieces(output, path, spec, chunks(spec.name))
                    continue
                tensor = read(spec.name)
                if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
                    raise CheckpointError(
                        f"{path}: {spec.name!r} was announced as {list(spec.shape)} {spec.dtype} but is "
                        f"{list(tensor.shape)} {tensor.dtype}"
                    )
                output.write(tensor_bytes(tensor))
        finally:
            written = output.close()
    return written


def _write_pieces(output: HashingFile, path: Path, spec: TensorSpec, pieces: Iterator[Tensor]) -> None:
    numel = 0
    for piece in pieces:
        if piece.dtype != spec.dtype:
            raise CheckpointError(f"{path}: {spec.name!r} was announced as {spec.dtype} but a piece is {piece.dtype}")
        output.write(tensor_bytes(piece))
        numel += piece.numel()
    if numel != math.prod(spec.shape):
        raise CheckpointError(f"{path}: {spec.name!r} was announced as {list(spec.shape)} but came in {numel} elements")
