"""Tells files by their first bytes, and refuses those that are not what they are taken for."""

from __future__ import annotations

from pathlib import Path

from sphinxkit.errors import DataError

HEAD = 4096  # bytes that are looked at to tell a format; our choice
MAGICS = {
    b"PK\x03\x04": "zip archive",
    b"PAR1": "Parquet file",
    b"BZh": "bzip2 file",
    b"\xfd7zXZ": "xz file",
    b"\x1f\x8b": "gzip file",
    b"\x28\xb5\x2f\xfd": "zstd file",
}
UNPACK = {"gzip file": "gunzip -k", "zstd file": "zstd -d", "bzip2 file": "bunzip2 -k", "xz file": "unxz -k"}
WANTED = {"jsonl": "JSON lines", "llava": "a JSON list", "tar": "a tar archive", "parquet": "a Parquet file"}


def read_head(path: Path) -> bytes:
    """The first bytes of a file.

    Raises:
        DataError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(HEAD)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def check_kind(path: Path, format_name: str) -> None:
    """Refuse a file that begins like another format.

    Args:
        path: The file.
        format_name: A key of ``WANTED``.
    Raises:
        DataError: It does, or it is compressed; the message names the command that unpacks it.
    """
    head = read_head(path)
    kind = next((kind for magic, kind in MAGICS.items() if head.startswith(magic)), None)
    if head[257:262] == b"ustar":
        kind = "tar archive"
    if kind in UNPACK:
        raise DataError(f"{path}: a {kind} cannot be read at any record; unpack it: {UNPACK[kind]} {path}")
    if not head and format_name != "jsonl":
        raise DataError(f"{path}: the file is empty")
    wanted = WANTED[format_name]
    is_json = format_name in ("jsonl", "llava")
    if kind is None and is_json and not _is_text(head):
        kind = "binary file"
    if format_name == "tar" and kind is None and not head.startswith((b"{", b"[")):
        return  # archives from before POSIX have no mark; a wrong one fails at its first header
    if kind != (None if is_json else wanted.removeprefix("a ")):
        got = f"a {kind}" if kind else f"something else: {head[:16]!r}"
        raise DataError(f"{path}: expected {wanted}, got {got}; name its `format` or convert it")


def _is_text(head: bytes) -> bool:
    try:
        return "\0" not in head.decode()
    except UnicodeDecodeError as error:
        return error.start >= len(head) - 3  # a character may be cut off at the end
