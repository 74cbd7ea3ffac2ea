"""Atomic writing of files and directories: temporary name, flush, rename.

A temporary name is ``.<name>.<random>.sphinxkit-tmp`` in the target's own folder, so that the rename stays on one file
system. The writer holds a system lock (``flock``), which ends with the process and works between containers: a
temporary file is locked itself, and the folders of one target share ``.<name>.lock.sphinxkit-tmp``. ``clean_leftovers``
removes unlocked leftovers. On a file system without locks nothing is removed.

An existing directory is replaced by exchanging it with the new one, which Linux does in one step. Where that is not
possible it is renamed to ``.<name>.<random>-old.sphinxkit-tmp`` first; a run that is killed between the two renames
leaves no target, and ``put_back`` (which every later run calls) puts the old one back.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sphinxkit.errors import DataError

TEMP_SUFFIX = ".sphinxkit-tmp"
_OLD = "-old"
_LOCK = "lock"
_TOKEN = re.compile(rf"[0-9a-f]{{16}}({_OLD})?|{_LOCK}")
_MAX_NAME = 200  # bytes of a name that stay readable in temporary ones; file systems allow 255
_AT_FDCWD = -100  # linux/fcntl.h
_RENAME_EXCHANGE = 2  # linux/fs.h
_NOT_POSSIBLE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)  # old kernel, or a file system without it
_NO_DIRECTORY_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # some network file systems


def _prefix(target: Path) -> str:
    name = os.fsencode(target.name)
    return f".{target.name}." if len(name) <= _MAX_NAME else f".{hashlib.sha256(name).hexdigest()}."


def _temporary(target: Path, kind: str = "") -> Path:
    return target.with_name(f"{_prefix(target)}{secrets.token_hex(8)}{kind}{TEMP_SUFFIX}")


def _leftovers(target: Path) -> list[Path]:
    """Temporary paths of ``target`` that are there, held or not."""
    prefix = _prefix(target)
    siblings = sorted(target.parent.iterdir()) if target.parent.is_dir() else []
    return [
        path
        for path in siblings
        if path.name.startswith(prefix)
        and path.name.endswith(TEMP_SUFFIX)
        and _TOKEN.fullmatch(path.name[len(prefix) : -len(TEMP_SUFFIX)])
    ]


def flush(path: Path) -> None:
    """Write a file's content, or a folder's list of files, through to the disk.

    Args:
        path: Existing file or folder.
    Raises:
        OSError: The disk fails.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in _NO_DIRECTORY_FSYNC:
            raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a file or a folder, also where Ctrl-C or SIGTERM comes in between."""
    try:
        _remove_once(path)
    except (KeyboardInterrupt, SystemExit):
        _remove_once(path)
        raise


def _remove_once(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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


def _flock(descriptor: int) -> bool:
    """Lock an open file without waiting; False where the file system has no locks.

    Raises:
        BlockingIOError: Another holds it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _is_still(descriptor: int, path: Path) -> bool:
    """Whether the open file still lies at ``path``."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


@contextmanager
def _folder_lock(target: Path) -> Iterator[bool]:
    """Hold the lock of all who write the folder ``target``; gives False where the file system has no locks.

    Raises:
        BlockingIOError: Another process is writing it.
    """
    path = target.with_name(f"{_prefix(target)}{_LOCK}{TEMP_SUFFIX}")
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            has_lock = _flock(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            message = "another process is writing it; wait for it or end it"
            raise BlockingIOError(errno.EWOULDBLOCK, message, str(target)) from None
        if not has_lock or _is_still(descriptor, path):
            break
        os.close(descriptor)  # its last holder removed it meanwhile
    try:
        yield has_lock
    finally:
        if has_lock:
            _remove(path)
        os.close(descriptor)


def _remove_unheld(path: Path) -> bool:
    """Remove a temporary file whose writer is gone."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if not _flock(descriptor) or not _is_still(descriptor, path):
            return False
        path.unlink()
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _clean_folders(target: Path) -> list[Path]:
    """Put back or remove every temporary folder of ``target``, whose lock is held."""
    handled = []
    for path in filter(_is_folder, _leftovers(target)):
        if path.name.endswith(_OLD + TEMP_SUFFIX) and not os.path.lexists(target):
            path.rename(target)
            flush(target.parent)
        else:
            _remove(path)
        handled.append(path)
    return handled


def clean_leftovers(target: str | Path) -> list[Path]:
    """Remove temporary files and folders for ``target`` that no process holds, or put back what was there before.

    Args:
        target: The final path; its temporary siblings are checked. If it is missing and a killed run had moved it
            aside, it is restored.
    Returns:
        What was removed or renamed.
    """
    target = Path(target)
    found = _leftovers(target)
    lock = f"{_prefix(target)}{_LOCK}{TEMP_SUFFIX}"
    handled = [path for path in found if not _is_folder(path) and path.name != lock and _remove_unheld(path)]
    if any(_is_folder(path) or path.name == lock for path in found):
        with suppress(OSError), _folder_lock(target) as has_lock:  # held by another, or not ours to write
            if has_lock:
                handled += _clean_folders(target)
    return handled


def put_back(target: str | Path) -> None:
    """Rename a folder back that a killed run had moved aside; nothing is removed.

    Args:
        target: The final path; if it is there, or another process is writing it, nothing is done.
    """
    target = Path(target)
    aside = [path for path in _leftovers(target) if path.name.endswith(_OLD + TEMP_SUFFIX)]
    if not aside or os.path.lexists(target):
        return
    with suppress(OSError), _folder_lock(target) as has_lock:
        if has_lock and not os.path.lexists(target):
            aside[-1].rename(target)


def _is_stream(target: Path) -> bool:
    """Whether ``target`` is there and neither file nor folder (a device, a pipe), or is an open descriptor."""
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return False
    named = target.parent.resolve() / (target.readlink() if target.is_symlink() else target.name)
    is_descriptor = Path("/proc") in (*named.parents, *target.parent.resolve().parents)  # /dev/stdout is a link there
    return is_descriptor or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


@contextmanager
def _through(target: Path) -> Iterator[Path]:
    """Yield a file elsewhere; on success its content is written to the device or pipe ``target``."""
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / f"stream{TEMP_SUFFIX}"
        temporary.touch()
        yield temporary
        with temporary.open("rb") as source, target.open("ab", buffering=0) as sink:
            while chunk := source.read(2**20):
                view = memoryview(chunk)
                while view:
                    view = view[sink.write(view) :]


def _keep_mode(temporary: Path, target: Path) -> None:
    """Give ``temporary`` the permissions and the owner of what it replaces."""
    try:
        old = target.stat()
    except FileNotFoundError:
        return
    new = temporary.stat()
    if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
        with suppress(OSError):  # only root may give files away
            os.chown(temporary, old.st_uid, old.st_gid)
    if stat.S_IMODE(old.st_mode) != stat.S_IMODE(temporary.stat().st_mode):
        temporary.chmod(stat.S_IMODE(old.st_mode))


@contextmanager
def atomic_file(target: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write; on success flush it and rename it to ``target``, on failure remove it.

    Args:
        target: Final path; an existing file is replaced in one step and keeps its permissions. A symbolic link is
            followed. For a device or a pipe, the content is written to it at the end.
    Raises:
        OSError: ``target`` is a folder, or cannot be written.
    """
    target = Path(target)
    if _is_stream(target):
        with _through(target) as temporary:
            yield temporary
        return
    if target.is_symlink():
        target = Path(os.path.realpath(target))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    clean_leftovers(target)
    temporary, descriptor = _new_file(target)
    try:
        yield temporary
        _keep_mode(temporary, target)
        flush(temporary)
        temporary.replace(target)
        flush(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _new_file(target: Path) -> tuple[Path, int]:
    """A new temporary file, and the open descriptor that holds its lock."""
    while True:
        temporary = _temporary(target)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with suppress(BlockingIOError):  # somebody is about to remove it as a leftover
            if not _flock(descriptor) or _is_still(descriptor, temporary):
                return temporary, descriptor
        os.close(descriptor)


@contextmanager
def named_errors(output: str | Path | None) -> Iterator[None]:
    """Errors of the system become errors that say which file they are about.

    Args:
        output: The file that is written, by itself or by files beside it whose names begin with its own; None for none.
    Raises:
        DataError: The output cannot be written, or another file cannot be read.
    """
    try:
        yield
    except OSError as error:
        path = None if error.filename is None else Path(error.filename)
        if output is not None and (path is None or _belongs(path, Path(output))):
            raise DataError(f"{output}: cannot be written: {error}") from error
        if path is None:
            raise
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _belongs(path: Path, output: Path) -> bool:
    is_beside = path.name.startswith(output.name) and path.parent == output.parent
    return path.name.endswith(TEMP_SUFFIX) or is_beside or path in output.parents


@contextmanager
def atomic_directory(target: str | Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success flush its files and rename it to ``target``, on failure remove it.

    An existing ``target`` is exchanged with the new folder, then removed: whoever looks sees the old folder or the
    new one, also after a kill or a power cut at any moment (after the next ``put_back``, where the file system cannot
    exchange). One process at a time writes a target.

    Args:
        target: Final path. A symbolic link to a folder is followed: the folder is replaced, the link stays.
    Raises:
        BlockingIOError: Another process is writing the same target.
        OSError: ``target`` is a file, or the disk fails.
    """
    target = Path(target)
    if target.is_symlink():
        target = Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    with _folder_lock(target) as has_lock:
        if has_lock:
            _clean_folders(target)
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
        temporary = _temporary(target)
        temporary.mkdir()
        try:
            yield temporary
            for path in [*temporary.rglob("*"), temporary]:
                flush(path)
            _install(temporary, target)
        except BaseException:
            if temporary.exists():
                _remove(temporary)
            raise


def _install(temporary: Path, target: Path) -> None:
    """Put the complete ``temporary`` in ``target``'s place and remove what was there."""
    if not target.exists():
        temporary.rename(target)
        flush(target.parent)
        return
    _keep_mode(temporary, target)
    previous = temporary
    if not _exchange(temporary, target):
        previous = _temporary(target, _OLD)
        try:
            target.rename(previous)
            temporary.rename(target)
        except BaseException:
            if previous.exists() and not target.exists():
                previous.rename(target)
            raise
    flush(target.parent)
    _remove(previous)
