"""Samples, and files of samples that can be read at any line."""

from __future__ import annotations

import json
import os
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from sphinxkit.errors import DataError
from sphinxkit.formatters import Message

if TYPE_CHECKING:
    from PIL.Image import Image

SampleType = Literal["text", "image-text"]

IMAGE_KEY = b'"image'  # begins the keys "image" and "images" in a line of JSON
HEAD = 4096  # bytes that are looked at to tell text from other files; our choice
MAGICS = {
    b"\x1f\x8b": "gzip file",
    b"PK\x03\x04": "zip archive",
    b"\x28\xb5\x2f\xfd": "zstd file",
    b"PAR1": "Parquet file",
    b"BZh": "bzip2 file",
    b"\xfd7zXZ": "xz file",
}
NEW_FILE_HINT = "make one with `sphinxkit convert-data FILE --format llava --output FILE.jsonl`"


@dataclass(frozen=True, slots=True)
class Sample:
    """One training sample: a conversation, or plain text.

    Args:
        id: Name in reports: source and line.
        task: Name of its task, or "".
        messages: The conversation; empty for plain text.
        text: Plain text; "" for a conversation.
        image: The image's path, or None.
        where: "file:line".
    """

    id: str
    task: str
    messages: tuple[Message, ...]
    text: str
    image: Path | None
    where: str

    @property
    def type(self) -> SampleType:
        """``image-text`` with an image, else ``text``."""
        return "text" if self.image is None else "image-text"

    def open_image(self) -> Image:
        """The image, upright, in RGB.

        Raises:
            DataError: There is no image, or it cannot be read; the message names file and sample.
        """
        from sphinxkit.tilers.images import load_image

        if self.image is None:
            raise DataError(f"sample {self.id}: it has no image")
        try:
            return load_image(self.image)
        except DataError as error:
            raise DataError(f"sample {self.id}: {error}") from error


def _refuse_binary(path: Path, head: bytes) -> None:
    """Refuse archives, compressed files and tables, which hold zero bytes or no UTF-8.

    Raises:
        DataError: The file begins like one.
    """
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        text = "" if error.start >= len(head) - 3 else "\0"  # a character may be cut off at the end
    if "\0" in text:
        kind = next((name for magic, name in MAGICS.items() if head.startswith(magic)), None)
        kind = kind or ("tar archive" if head[257:262] == b"ustar" else "binary file")
        raise DataError(f"{path}: expected JSON lines, got a {kind}; unpack or convert it first")


@dataclass(slots=True)
class JsonLinesFile:
    """A JSON-lines file with an index of its lines, for random access.

    The index takes 17 bytes per line. Every process opens the file itself, so instances can be passed to workers.

    Args:
        path: The file; empty lines are skipped.
    Raises:
        DataError: It cannot be read, holds no records, or is a JSON list or a binary file.
    """

    path: Path
    _offsets: array[int] = field(init=False, repr=False)
    _lines: array[int] = field(init=False, repr=False)
    _images: bytearray = field(init=False, repr=False)
    _file: BinaryIO | None = field(init=False, repr=False, default=None)
    _pid: int = field(init=False, repr=False, default=-1)

    def __post_init__(self) -> None:
        self._offsets, self._lines, self._images = array("Q"), array("Q"), bytearray()
        try:
            with self.path.open("rb") as file:
                _refuse_binary(self.path, file.read(HEAD))
                file.seek(0)
                offset = 0
                for number, line in enumerate(file, 1):
                    if not self._offsets and line.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
                        raise DataError(f"{self.path}: a JSON list cannot be read at any record; {NEW_FILE_HINT}")
                    if not line.isspace():
                        self._offsets.append(offset)
                        self._lines.append(number)
                        self._images.append(IMAGE_KEY in line)
                    offset += len(line)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from error
        if not self._offsets:
            raise DataError(f"{self.path}: no records")

    def __len__(self) -> int:
        return len(self._offsets)

    def __getstate__(self) -> tuple[Path, array[int], array[int], bytearray]:
        return self.path, self._offsets, self._lines, self._images

    def __setstate__(self, state: tuple[Path, array[int], array[int], bytearray]) -> None:
        self.path, self._offsets, self._lines, self._images = state
        self._file, self._pid = None, -1

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; it is opened again when it is needed."""
        if self._file is not None:
            self._file.close()
        self._file, self._pid = None, -1

    def may_have_image(self, index: int) -> bool:
        """Whether record ``index`` may name an image; False is certain, as the line holds no such key."""
        return bool(self._images[index])

    def where(self, index: int) -> str:
        """File and line of record ``index``, as "file:line"."""
        return f"{self.path}:{self._lines[index]}"

    def read(self, index: int) -> dict[str, Any]:
        """Record ``index``.

        Raises:
            DataError: The line is not a JSON object.
        """
        if self._file is None or self._pid != os.getpid():
            self._file, self._pid = self.path.open("rb"), os.getpid()
        self._file.seek(self._offsets[index])
        line = self._file.readline().removeprefix(b"\xef\xbb\xbf")
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.where(index)}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise DataError(f"{self.where(index)}: a record must be an object, got {type(record).__name__}")
        return record
