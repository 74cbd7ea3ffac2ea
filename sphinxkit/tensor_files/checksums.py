"""Checksums of files and of ranges in them."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_CHUNK = 4 * 2**20  # bytes hashed at a time, the only memory this takes; our choice


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Check:
    """A range of a file and the checksum that it must have.

    Attributes:
        file: The file.
        begin: First byte.
        end: Byte after the last one.
        algorithm: What ``expected`` is.
        expected: In hex.
        message: What to say if it differs.
    """

    file: Path
    begin: int
    end: int
    algorithm: Literal["sha256", "crc32"]
    expected: str
    message: str


def _pieces(check: Check) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(_CHUNK, check.end - check.begin)))
    with check.file.open("rb", buffering=0) as file:
        file.seek(check.begin)
        left = check.end - check.begin
        while left and (count := file.readinto(buffer[: min(left, len(buffer))])):
            left -= count
            yield buffer[:count]


def _digest(check: Check, progress: Callable[[int], None]) -> str:
    if check.algorithm == "sha256":
        hashed = hashlib.sha256()
        for piece in _pieces(check):
            hashed.update(piece)
            progress(len(piece))
        return hashed.hexdigest()
    crc = 0
    for piece in _pieces(check):
        crc = zlib.crc32(piece, crc)
        progress(len(piece))
    return f"{crc:08x}"


def compare(checks: Iterable[Check], progress: Callable[[int], None] = lambda num_bytes: None) -> list[str]:
    """What differs from its checksum.

    Args:
        checks: What to read.
        progress: Told of the bytes that were read.
    """
    errors = []
    for check in checks:
        try:
            if _digest(check, progress) != check.expected:
                errors.append(check.message)
        except OSError as error:
            errors.append(f"{check.file}: cannot be read: {error}")
    return errors
