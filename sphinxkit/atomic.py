"""Files and directories that appear whole or not at all: temporary name, flush, rename.

A temporary name is ``.<name>.<pid>.sphinxkit-tmp`` in the target's own folder, so that the rename stays on one file
system; ``clean_leftovers`` removes what a killed run left behind.

An existing directory is replaced by exchanging it with the new one, which Linux does in one step. Where that is not
possible it is renamed to ``.<name>.old.<pid>.sphinxkit-tmp`` first; a run that is killed between the two renames
leaves no target, and ``clean_leftovers`` (which every later run calls) puts the old one back.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMP_SUFFIX = ".sphinxkit-tmp"
_OLD = "old."
_AT_FDCWD = -100  # linux/fcntl.h
_RENAME_EXCHANGE = 2  # linux/fs.h
_NOT_POSSIBLE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)  # old kernel, or a file system without it
_NO_DIRECTORY_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # some network file systems


def _temporary(target: Path, kind: str = "") -> Path:
    return target.with_name(f".{target.name}.{kind}{os.getpid()}{TEMP_SUFFIX}")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in _NO_DIRECTORY_FSYNC:
            raise
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


def _exchange(one: Path, other: Path) -> bool:
    """Swap two existing paths in one step; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_POSSIBLE:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def clean_leftovers(target: str | Path) -> list[Path]:
    """Remove temporary files and folders for ``target`` whose process is gone, or put back what was there before.

    Args:
        target: The final path; its siblings with the temporary name are looked at. If it is missing and a killed run
            had moved it aside, it is restored.
    Returns:
        What was removed or renamed.
    """
    target = Path(target)
    prefix = f".{target.name}."
    handled = []
    siblings = sorted(target.parent.iterdir()) if target.parent.is_dir() else []
    for path in siblings:
        if not (path.name.startswith(prefix) and path.name.endswith(TEMP_SUFFIX)):
            continue
        kind = path.name[len(prefix) : -len(TEMP_SUFFIX)]
        pid = kind.removeprefix(_OLD)
        if not pid.isdigit() or (int(pid) != os.getpid() and _is_alive(int(pid))):
            continue
        if kind.startswith(_OLD) and not os.path.lexists(target):
            path.rename(target)
            _fsync(target.parent)
        else:
            _remove(path)
        handled.append(path)
    return handled


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

    An existing ``target`` is exchanged with the new folder, then removed: whoever looks sees the old folder or the
    new one, also after a kill or a power cut at any moment (after the next ``clean_leftovers``, where the file system
    cannot exchange).

    Args:
        target: Final path. A symbolic link to a folder is followed: the folder is replaced, the link stays.
    Raises:
        OSError: ``target`` is a file, or the disk fails.
    """
    target = Path(target)
    if target.is_symlink():
        target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    clean_leftovers(target)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
    temporary = _temporary(target)
    temporary.mkdir()
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _fsync(path)
        _install(temporary, target)
    except BaseException:
        clean_leftovers(target)  # this process's own; puts the old folder back if it was just moved aside
        raise


def _install(temporary: Path, target: Path) -> None:
    """Put the complete ``temporary`` in ``target``'s place and remove what was there."""
    if not target.exists():
        temporary.rename(target)
        _fsync(target.parent)
        return
    previous = temporary
    if not _exchange(temporary, target):
        previous = _temporary(target, _OLD)
        target.rename(previous)
        try:
            temporary.rename(target)
        except BaseException:
            previous.rename(target)
            raise
    _fsync(target.parent)
    _remove(previous)
