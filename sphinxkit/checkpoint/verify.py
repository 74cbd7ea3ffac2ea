"""Checksums of a checkpoint's files, compared in a second thread while the tensors are being copied.

Both walk the files in about the same order and neither may run far ahead of the other, so whatever one of them brings
in from the disk is still in the page cache when the other one wants it: a file is read from the disk once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from types import TracebackType

from sphinxkit.errors import CheckpointError, raise_errors
from sphinxkit.tensor_files.checksums import Check, compare
from sphinxkit.tensor_files.torch_zip import zip_checks

DAMAGED = "files are truncated or were tampered with; fetch them again"
_OPT_OUT = "(verify=False loads them unchecked)"
_WINDOW = 2**30  # how far copying and hashing may run apart, which the page cache has to hold; our choice


def torch_files_checks(files: Iterable[Path]) -> list[Check]:
    """The checks of several torch files, taken in turns, as slices of one tensor are read."""
    turns = zip_longest(*[zip_checks(file) for file in files])
    return [check for check in chain.from_iterable(turns) if check is not None]


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
        self._errors: list[str] = []
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
            self._errors += compare(self._checks(), self._progress)
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
        raise_damaged(self._label, self._errors)


def raise_damaged(label: str, errors: Sequence[str]) -> None:
    """Raise one error that lists the damaged files or records; nothing happens when there are none."""
    raise_errors(f"{label}: {DAMAGED}", [*errors, _OPT_OUT] if errors else [])
