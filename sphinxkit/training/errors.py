"""Errors of training runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sphinxkit.errors import SphinxkitError


class TrainingError(SphinxkitError, RuntimeError):
    """A run cannot start, continue or resume. Earlier checkpoints are intact."""


@contextmanager
def named_errors(path: str | Path, what: str = "written") -> Iterator[None]:
    """Errors of the system become a ``TrainingError`` with the path and the cause.

    Args:
        path: What is worked on.
        what: Done with it.
    Raises:
        TrainingError: The disk is full or fails, or the path is not ours to write.
    """
    try:
        yield
    except OSError as error:
        raise TrainingError(f"{path} cannot be {what}: {error.strerror or error}") from error
