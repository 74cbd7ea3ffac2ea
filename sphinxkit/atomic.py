"""Files and directories that appear whole or not at all: temporary name, flush, rename.

A temporary name is ``.<name>.<pid>.sphinxkit-tmp`` in the target's own folder, so that the rename stays on one file
system; ``clean_leftovers`` removes what a killed run left behind.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMP_SUFFIX = ".sphinxkit-tmp"


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}{TEMP_SUFFIX}")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def clean_leftovers(target: str | Path) -> list[Path]:
    """Remove temporary files and folders for ``target`` whose process is gone.

    Args:
        target: The final path; its siblings with the temporary name are looked at.
    Returns:
        What was removed.
    """
    target = Path(target)
    removed = []
    for path in target.parent.glob(f".{target.name}.*{TEMP_SUFFIX}"):
        pid = path.name[len(target.name) + 2 : -len(TEMP_SUFFIX)]
        if pid.isdigit() and (int(pid) == os.getpid() or not _is_alive(int(pid))):
            _remove(path)
            removed.append(path)
    return removed


@contextmanager
def atomic_file(target: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write; on success flush it and rename it to ``target``, on failure remove it.

    Args:
        target: Final path; an existing file is replaced in one step.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    clean_leftovers(target)
    temporary = _temporary(target)
    try:
        yield temporary
        _fsync(temporary)
        temporary.replace(target)
        _fsync(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_directory(target: str | Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success flush its files and rename it to ``target``, on failure remove it.

    An existing ``target`` is renamed aside, replaced, then removed: a reader sees the old folder or the new one.

    Args:
        target: Final path.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    clean_leftovers(target)
    temporary = _temporary(target)
    temporary.mkdir()
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _fsync(path)
        if target.exists():
            previous = target.with_name(f".{target.name}.old.{os.getpid()}{TEMP_SUFFIX}")
            target.rename(previous)
            try:
                temporary.rename(target)
            except BaseException:
                previous.rename(target)
                raise
            _remove(previous)
        else:
            temporary.rename(target)
        _fsync(target.parent)
    except BaseException:
        if temporary.exists():
            _remove(temporary)
        raise
