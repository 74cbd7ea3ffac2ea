"""Whether the files of a run's data are still those that it read before it stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from sphinxkit.errors import DataError
from sphinxkit.tensor_files.checksums import file_sha256

WHOLE_BYTES = 2 * 2**30
"""Files up to this size are read whole; of larger ones ``SAMPLES`` pieces are, evenly spread. Our choice."""

SAMPLES, SAMPLE_BYTES = 512, 2**20


def content_digest(path: Path) -> str:
    """Changes with the size of a file and its content (of a very large file: that of pieces all over it).

    Args:
        path: Of the file.
    Raises:
        DataError: It cannot be read.
    """
    try:
        size = path.stat().st_size
        if size <= WHOLE_BYTES:
            return file_sha256(path)
        total = hashlib.sha256(str(size).encode())
        with path.open("rb") as file:
            for number in range(SAMPLES):
                file.seek((size - SAMPLE_BYTES) * number // (SAMPLES - 1))
                total.update(file.read(SAMPLE_BYTES))
        return f"pieces:{total.hexdigest()}"
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def changed_files(paths: Sequence[Path], saved: Sequence[str], current: Sequence[str]) -> list[Path]:
    """The files whose content differs.

    Args:
        paths: Now, in the mixture's order.
        saved: Digests of the run that stopped; empty: it kept none.
        current: Digests now.
    """
    return [path for path, old, new in zip(paths, saved, current, strict=False) if old != new]
