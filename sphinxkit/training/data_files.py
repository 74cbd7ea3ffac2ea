"""Checks that a run's data files have not changed since it stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sphinxkit.errors import DataError
from sphinxkit.tensor_files.checksums import file_sha256

WHOLE_BYTES = 2 * 2**30
"""Files up to this size are read whole; of larger ones ``SAMPLES`` pieces are, evenly spread. Our choice."""

SAMPLES, SAMPLE_BYTES = 512, 2**20
MIN_SAMPLES, MIN_SAMPLE_BYTES = 2, 2**12  # of each of many files: its begin and its end
THREADS = 16  # that wait for a file system; our choice


def content_digests(paths: Sequence[Path]) -> list[str]:
    """Hashes of files' sizes and contents; of many or large files, of samples of their content.

    Raises:
        DataError: One cannot be read.
    """
    share = max(len(paths), 1)
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda path: content_digest(path, share), paths))


def content_digest(path: Path, share: int = 1) -> str:
    """Hash a file's size and content (of a large file: samples of its content).

    Args:
        path: The file.
        share: Number of files that share the limits of what is read.
    Raises:
        DataError: It cannot be read.
    """
    samples = max(SAMPLES // share, MIN_SAMPLES)
    length = min(SAMPLE_BYTES, max(SAMPLES * SAMPLE_BYTES // (share * samples), MIN_SAMPLE_BYTES))
    try:
        size = path.stat().st_size
        if size <= WHOLE_BYTES // share:
            return file_sha256(path)
        total = hashlib.sha256(str(size).encode())
        with path.open("rb") as file:
            for number in range(samples):
                file.seek(max(size - length, 0) * number // (samples - 1))
                total.update(file.read(length))
        return f"pieces:{total.hexdigest()}"
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def changed_files(paths: Sequence[Path], saved: Sequence[str], current: Sequence[str]) -> list[Path]:
    """The files whose content differs.

    Args:
        paths: Current files, in the mixture's order.
        saved: Digests of the stopped run; with another number of files, none can be compared.
        current: Current digests.
    """
    if len(saved) != len(current):
        return []
    return [path for path, old, new in zip(paths, saved, current, strict=True) if old != new]
