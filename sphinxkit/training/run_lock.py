"""One run per folder: a file lock that the system releases when its process ends."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sphinxkit.training.errors import TrainingError

LOCK_FILE = ".lock"


class _Lock:
    """An open file with an exclusive ``flock``; forked processes (data readers) close their copy."""

    def __init__(self, path: Path) -> None:
        import fcntl

        self.descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self.descriptor, 1000, 0).decode(errors="replace")
            self.close()
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise TrainingError(
                    f"{path.parent} is in use by another training run: {_describe(holder)}. Wait for it to end, or "
                    "name another output folder"
                ) from error
            warnings.warn(
                f"{path.parent} cannot be locked ({error.strerror}): nothing stops a second run in this folder",
                RuntimeWarning,
                stacklevel=4,
            )
            return
        os.register_at_fork(after_in_child=self.close)
        holder = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T %z")})
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, holder.encode(), 0)

    def close(self) -> None:
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def _describe(holder: str) -> str:
    try:
        found = json.loads(holder)
        return f"process {found['pid']} on {found['host']}, since {found['since']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "it has just started"


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a run folder.

    The lock is a system lock (``flock``). It works between containers and, on most network file systems, between
    machines. A killed process leaves no stale lock.

    Args:
        folder: Run folder; created if missing.
    Raises:
        TrainingError: Another process holds it (the message names it), or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _Lock(folder / LOCK_FILE)
    except OSError as error:
        raise TrainingError(f"{folder}: cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        lock.close()
