"""Checksums of a checkpoint's files, compared in a second thread while the tensors are being copied.

Both walk the files in about the same order and neither may run far ahead of the other, so whatever one of them brings
in from the disk is still in the page cache when the other one wants it: a file is read from the disk once.
"""

from __future__ import annotations

import hashlib
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from types import TracebackType
from typing import Literal

from sphinxkit.checkpoint.entries import raise_faults
from sphinxkit.errors import CheckpointError

DAMAGED = "files are truncated or were tampered with; fetch them again"
_OPT_OUT = "(verify=False, on the command line --no-verify, loads them unchecked)"
_CHUNK = 4 * 2**20  # bytes hashed at a time, the only memory this takes; our choice
_WINDOW = 2**30  # how far copying and hashing may run apart, which the page cache has to hold; our choice
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip record: it ends with the lengths of its name and extra field


@dataclass(frozen=True)
class Check:
    """A range of a file and the checksum that it must have.

    Attributes:
        file: The file.
        begin: First byte.
        end: Byte after the last one.
        algorithm: What ``expected`` is.
        expected: In hex.
        fault: What to say if it differs.
    """

    file: Path
    begin: int
    end: int
    algorithm: Literal["sha256", "crc32"]
    expected: str
    fault: str


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
                name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
                begin = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
                fault = f"{path}: record {info.filename} does not match its checksum"
                checks.append(Check(path, begin, begin + info.file_size, "crc32", f"{info.CRC:08x}", fault))
    except (OSError, ValueError, struct.error, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: its list of records is damaged: {error}; fetch the file again") from error
    return checks


def torch_files_checks(files: Iterable[Path]) -> list[Check]:
    """The checks of several torch files, taken in turns, as slices of one tensor are read."""
    turns = zip_longest(*[zip_checks(file) for file in files])
    return [check for check in chain.from_iterable(turns) if check is not None]


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


class _StoppedError(Exception):
    """Nobody wants the rest."""


class Verification:
    """Compares checksums in a thread of its own for as long as its ``with`` block lasts, and at its end.

    Args:
        label: The folder, for messages.
        checks: Gives what to compare, in about the order in which the block reads.

    Raises:
        CheckpointError: When the block is left: every range that differs. Also in place of an error about the tensors
            that were read in the block, because a damaged file explains it. If the block failed before it read
            anything, nothing more is compared.
    """

    def __init__(self, label: str, checks: Callable[[], Sequence[Check]]) -> None:
        self._label = label
        self._checks = checks
        self._faults: list[str] = []
        self._error: BaseException | None = None
        self._hashed = 0
        self._copied = 0
        self._is_copying = True
        self._is_hashing = True
        self._is_stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="sphinxkit-verify", daemon=True)

    def copied(self, num_bytes: int) -> None:
        """Say that the block reads so many bytes more; waits where hashing has fallen far behind."""
        with self._changed:
            self._copied += num_bytes
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._is_hashing or self._copied - self._hashed <= _WINDOW)

    def _progress(self, num_bytes: int) -> None:
        with self._changed:
            self._hashed += num_bytes
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._is_copying or self._hashed - self._copied <= _WINDOW)
            if self._is_stopped:
                raise _StoppedError

    def _run(self) -> None:
        try:
            self._faults += compare(self._checks(), self._progress)
        except _StoppedError:
            pass
        except BaseException as error:  # it belongs to the thread that waits
            self._error = error
        finally:
            with self._changed:
                self._is_hashing = False
                self._changed.notify_all()

    def __enter__(self) -> Verification:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._is_copying = False
            self._is_stopped = error is not None and not (isinstance(error, CheckpointError) and self._copied)
            self._changed.notify_all()
        self._thread.join()
        if self._is_stopped:
            return
        if self._error is not None:
            raise self._error
        raise_damaged(self._label, self._faults)


def compare(checks: Iterable[Check], progress: Callable[[int], None] = lambda num_bytes: None) -> list[str]:
    """What differs from its checksum.

    Args:
        checks: What to read.
        progress: Told of the bytes that were read.
    """
    faults = []
    for check in checks:
        try:
            if _digest(check, progress) != check.expected:
                faults.append(check.fault)
        except OSError as error:
            faults.append(f"{check.file}: cannot be read: {error}")
    return faults


def raise_damaged(label: str, faults: Sequence[str]) -> None:
    """Raise one error that lists the damaged files or records; nothing happens when there are none."""
    raise_faults(f"{label}: {DAMAGED}", [*faults, _OPT_OUT] if faults else [])
