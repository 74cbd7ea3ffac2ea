"""Progress bars on stderr, so that stdout stays for results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def byte_progress(title: str, total: int) -> Iterator[Callable[[str, int], None]]:
    """A bar of bytes; yields ``advance(key, num_bytes)``. Shown on a terminal only.

    Args:
        title: What is being done.
        total: Bytes in all.
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
        task = bar.add_task(title, total=total)

        def advance(key: str, num_bytes: int) -> None:
            bar.update(task, advance=num_bytes)

        yield advance
