"""What this machine can do: bandwidths, matmul rates and disk speed, measured in the run that uses them."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from benchmarks.results import Ceilings

Size = Literal["full", "quick", "micro"]
# Our choice: far beyond the caches of any machine this runs on (L3 of tens of MB, L2 of 60 MB on a Hopper GPU).
COPY_ELEMENTS = {"cpu": 64 * 2**20, "cuda": 2**30, "quick": 32 * 2**20, "micro": 2**16}
# Our choice: large enough that a library's peak rate shows, small enough for a second on two CPU cores.
MATMUL_SIDE = {"cpu": 2048, "cuda": 8192, "quick": 1024, "micro": 64}
DISK_BYTES = {"full": 512 * 2**20, "quick": 128 * 2**20, "micro": 2**20}
ROUNDS = 5


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: CUDA events on a GPU, the clock elsewhere."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _best(call: Callable[[], object], device: torch.device) -> float:
    call()
    return max(min(seconds_of(call, device) for _ in range(ROUNDS)), 1e-9)


def bandwidths(device: torch.device, size: Size) -> tuple[float, float]:
    """(copy, read) bytes per second of device memory; a copy counts the bytes read and the bytes written."""
    elements = COPY_ELEMENTS[device.type if size == "full" else size]
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    copied = _best(lambda: target.copy_(source), device)
    return 2 * source.nbytes / copied, source.nbytes / _read_seconds(source, device)


def _read_seconds(source: Tensor, device: torch.device) -> float:
    # the best of three kinds of pass: which of them a library runs at memory speed differs between versions
    matrix = source.view(2, 64, -1)
    vector = torch.randn(2, matrix.shape[2], 1, device=device)
    return min(
        _best(lambda: source.view(torch.int32).amax(), device),
        _best(lambda: source.sum(), device),
        _best(lambda: torch.bmm(matrix, vector), device),
    )


def matmul_rate(dtype: torch.dtype, device: torch.device, size: Size) -> float:
    """FLOP/s of a square product of random matrices."""
    side = MATMUL_SIDE[device.type if size == "full" else size]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _best(lambda: a @ b, device)


def drop_page_cache(path: Path) -> None:
    """Ask the kernel to forget a file's pages, so that the next read comes from the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def read_through(path: Path, block: int = 8 * 2**20) -> float:
    """Seconds of reading a file from end to end."""
    buffer = bytearray(block)
    begin = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - begin


def disk_rates(folder: Path, size: Size) -> tuple[float, float, float]:
    """(read, write, copy) bytes per second in ``folder``: cold read, write with sync, cold copy with sync."""
    total = DISK_BYTES[size]
    folder.mkdir(parents=True, exist_ok=True)
    source, target = folder / "ceiling.bin", folder / "ceiling-copy.bin"
    block = os.urandom(min(total, 16 * 2**20))
    try:
        begin = time.perf_counter()
        with source.open("wb", buffering=0) as file:
            for _ in range(total // len(block)):
                file.write(block)
            os.fsync(file.fileno())
        written = time.perf_counter() - begin
        drop_page_cache(source)
        read = read_through(source)
        drop_page_cache(source)
        begin = time.perf_counter()
        shutil.copyfile(source, target)
        with target.open("rb+") as file:
            os.fsync(file.fileno())
        copied = time.perf_counter() - begin
    finally:
        source.unlink(missing_ok=True)
        target.unlink(missing_ok=True)
    return total / read, total / written, total / copied


def measure(device: torch.device, scratch: Path, size: Size, disk: bool) -> Ceilings:
    """All ceilings at once: a few seconds.

    Args:
        device: Where memory and matmul are measured.
        scratch: Folder on the disk that matters.
        size: "quick" takes about two seconds; "micro" proves the path, its numbers mean nothing.
        disk: Whether to measure the disk, too (half a gigabyte written, read and copied).
    """
    copy, read = bandwidths(device, size)
    dtypes = [torch.float32, torch.bfloat16] + ([torch.float16] if device.type == "cuda" else [])
    rates = {str(dtype).removeprefix("torch."): matmul_rate(dtype, device, size) for dtype in dtypes}
    disks = disk_rates(scratch, size) if disk else (None, None, None)
    return Ceilings(
        copy_bandwidth=copy,
        read_bandwidth=max(read, copy),
        matmul=rates,
        disk_read=disks[0],
        disk_write=disks[1],
        disk_copy=disks[2],
    )
