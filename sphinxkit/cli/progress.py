"""Progress bars on stderr; stdout is for results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """Callback with the name and bytes of a finished tensor, and the total bytes."""

    def __call__(self, key: str, num_bytes: int, total: int | None = None) -> None:
        """Move the bar on."""


@contextmanager
def byte_progress(title: str, total: int | None = None) -> Iterator[Advance]:
    """A bar of bytes; yields ``advance(key, num_bytes, total)``. Shown on a terminal only, once bytes have come.

    Args:
        title: Title of the bar.
        total: Total bytes, if known.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total, visible=total is not None)

        def advance(key: str, num_bytes: int, total: int | None = None) -> None:
            bar.update(task, advance=num_bytes, total=total, visible=True)  # rich keeps what it had for None

        yield advance
