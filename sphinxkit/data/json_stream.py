"""Read the records of large JSON and JSON-lines files one by one, in bounded memory, with their line numbers.

Only one record and one chunk of the file are held at a time, so files much larger than the memory can be read. A record
that is not valid JSON is reported and skipped when its end can be found by its brackets.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeGuard

from sphinxkit.errors import DataError

CHUNK = 1 << 20  # characters per read; our choice
HEAD = 1 << 24  # bytes of a line that are looked at to tell JSON lines from JSON; our choice
NUMBER_TAIL = 3  # "1" may go on as "1e+5": so many characters must follow before a number is known to have ended
_SPACE = re.compile(r"[ \t\r\n]*")
_STRUCTURE = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{},"]', re.DOTALL)

OnMalformed = Callable[[int, str], None]


class JsonItem(NamedTuple):
    """One record: the line that it starts on (from 1), its key in an object or None in an array, and its value."""

    line: int
    key: str | None
    value: Any


def is_finite_number(value: Any) -> TypeGuard[int | float]:
    """Whether a JSON value is a number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


class _MalformedError(Exception):
    """A record with an end that can be found but content that is not JSON."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line
        self.reason = reason


def _element_end(text: str, start: int) -> int | None:
    """Where the value at ``start`` ends by its brackets: at the ',' or bracket after it. None: beyond this text."""
    depth = 0
    for match in _STRUCTURE.finditer(text, start):
        mark = match.group()
        if mark in "[{":
            depth += 1
        elif mark in "]}":
            if depth == 0:
                return match.start()
            depth -= 1
        elif mark == "," and depth == 0:
            return match.start()
        elif mark == '"':
            return None
    return None


class _Reader:
    """A window over a text file: ``text[pos:]`` is what has been read and not consumed."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self.path, self.file = path, file
        self.text, self.pos, self.line, self.at_end = "", 0, 1, False
        self.decoder = json.JSONDecoder()

    def fail(self, what: str) -> DataError:
        return DataError(f"{self.path}:{self.line}: {what}")

    def refill(self) -> bool:
        """Read on, twice as much when a record does not fit; False at the end of the file."""
        self.text, self.pos = self.text[self.pos :], 0
        try:
            chunk = self.file.read(max(CHUNK, len(self.text)))
        except UnicodeDecodeError as error:
            raise self.fail(f"not UTF-8 ({error.reason}) within the next {CHUNK} bytes") from error
        self.at_end = not chunk
        self.text += chunk
        return not self.at_end

    def advance(self, end: int) -> None:
        self.line += self.text.count("\n", self.pos, end)
        self.pos = end

    def peek(self) -> str:
        """The next character that is not white space, or an empty string at the end of the file."""
        while True:
            match = _SPACE.match(self.text, self.pos)
            self.advance(match.end() if match else self.pos)
            if self.pos < len(self.text):
                return self.text[self.pos]
            if not self.refill():
                return ""

    def expect(self, character: str) -> None:
        found = self.peek()
        if found != character:
            raise self.fail(f"expected {character!r}, found {found!r}" if found else f"ends where {character!r} is due")
        self.pos += 1

    def value(self) -> Any:
        """The JSON value that starts here."""
        if not self.peek():
            raise self.fail("ends where a record is due")
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.pos)
            except (ValueError, RecursionError) as error:  # ValueError: no JSON, or an integer of thousands of digits
                end_of_element = _element_end(self.text, self.pos)
                if end_of_element is not None:
                    deep = "nested too deeply" if isinstance(error, RecursionError) else str(error)
                    line, reason = self.line, getattr(error, "msg", deep)
                    if isinstance(error, json.JSONDecodeError):
                        line += self.text.count("\n", self.pos, error.pos)
                    self.advance(end_of_element)
                    raise _MalformedError(line, f"not JSON: {reason}") from error
                if not self.refill():
                    raise self.fail("the file ends inside this record") from error
                continue
            length = end - self.pos
            if len(self.text) - end < NUMBER_TAIL and self.refill():
                continue
            self.advance(self.pos + length)
            return value


def _walk(reader: _Reader, on_malformed: OnMalformed | None) -> Iterator[JsonItem]:
    """The elements of the array or the members of the object that starts here."""
    opening = reader.peek()
    closing = {"[": "]", "{": "}"}.get(opening)
    if closing is None:
        raise reader.fail(f"expected an array or an object, found {opening!r}")
    reader.pos += 1
    if reader.peek() == closing:
        reader.pos += 1
        return
    while True:
        key = None
        if opening == "{":
            if reader.peek() != '"':
                raise reader.fail(f"expected a key, found {reader.peek()!r}")
            key = str(reader.value())
            reader.expect(":")
        reader.peek()
        line = reader.line
        try:
            item = JsonItem(line, key, reader.value())
        except _MalformedError as error:
            if on_malformed is None:
                raise DataError(f"{reader.path}:{error.line}: {error.reason}") from error
            on_malformed(error.line, error.reason)
        else:
            yield item
        found = reader.peek()
        if found not in (",", closing):
            raise reader.fail(f"expected ',' or {closing!r} after a record, found {found!r}")
        reader.pos += 1
        if found == closing:
            return


def _skip(reader: _Reader) -> None:
    if reader.peek() in ("[", "{"):
        for _ in _walk(reader, lambda _line, _reason: None):
            pass
    else:
        reader.value()


def _open(path: Path) -> TextIO:
    try:
        return path.open(encoding="utf-8-sig", newline="")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def iter_json(path: str | Path, on_malformed: OnMalformed | None = None) -> Iterator[JsonItem]:
    """The records of a JSON array or object, one by one.

    Args:
        path: A file in UTF-8.
        on_malformed: Called with the line and the reason for a record that is not JSON but whose end can be found; such
            records are skipped. None: they are errors.
    Yields:
        One ``JsonItem`` per element (array) or member (object).
    Raises:
        DataError: The file cannot be read or is cut off; names file and line.
    """
    path = Path(path)
    with _open(path) as file:
        reader = _Reader(path, file)
        yield from _walk(reader, on_malformed)
        if reader.peek():
            raise reader.fail(f"text after the end: {reader.peek()!r}")


def iter_json_members(
    path: str | Path, members: Collection[str], on_malformed: OnMalformed | None = None
) -> Iterator[tuple[str, JsonItem]]:
    """The elements of some members of a JSON object ("images", "annotations"), in the order of the file, in one pass.

    Args:
        path: A file in UTF-8 that holds one object; other members are skipped.
        members: Names of the members to read; all must exist. A member that is neither array nor object counts as one
            element.
        on_malformed: See ``iter_json``.
    Yields:
        (member, its element).
    Raises:
        DataError: As ``iter_json``, or a member is missing.
    """
    path = Path(path)
    missing = set(members)
    with _open(path) as file:
        reader = _Reader(path, file)
        reader.expect("{")
        while reader.peek() != "}":
            try:
                key = reader.value()
                reader.expect(":")
                if key in members:
                    missing.discard(key)
                    if reader.peek() in ("[", "{"):
                        for item in _walk(reader, on_malformed):
                            yield key, item
                    else:
                        yield key, JsonItem(reader.line, None, reader.value())
                else:
                    _skip(reader)
            except _MalformedError as error:
                raise DataError(f"{path}:{error.line}: {error.reason}") from error
            if reader.peek() != "}":
                reader.expect(",")
    if missing:
        raise DataError(f"{path}: the object has no member {', '.join(sorted(missing))}")


def iter_json_lines(path: str | Path, on_malformed: OnMalformed | None = None) -> Iterator[JsonItem]:
    """The records of a JSON-lines file; empty lines are skipped.

    Args:
        path: A file in UTF-8, one JSON value per line.
        on_malformed: See ``iter_json``.
    Raises:
        DataError: The file cannot be read, or a line is not JSON and ``on_malformed`` is None.
    """
    path = Path(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    with file:
        for number, raw in enumerate(file, 1):
            line = raw.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else raw.strip()
            if not line:
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
                reason = f"not JSON: {error}"
                if on_malformed is None:
                    raise DataError(f"{path}:{number}: {reason}") from error
                on_malformed(number, reason)
                continue
            yield JsonItem(number, None, value)


def is_json_lines(path: str | Path) -> bool:
    """Whether a file holds JSON lines rather than one JSON array or object.

    True for the suffixes .jsonl and .ndjson, and for a file whose first two lines that are not empty are JSON objects.

    Raises:
        DataError: The file cannot be read.
    """
    path = Path(path)
    if path.suffix in (".jsonl", ".ndjson"):
        return True
    heads: list[bytes] = []
    try:
        with path.open("rb") as file:
            while len(heads) < 2 and (line := file.readline(HEAD)):
                line = line.removeprefix(b"\xef\xbb\xbf").strip()
                if line and not line.startswith(b"{"):
                    return False
                heads += [line] if line else []
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return len(heads) == 2 and all(isinstance(json.loads(head), dict) for head in heads)
    except (ValueError, RecursionError):
        return False


def iter_records(path: str | Path, on_malformed: OnMalformed | None = None) -> Iterator[JsonItem]:
    """The records of a JSON array, a JSON object (its members) or a JSON-lines file, whichever the file is.

    Raises:
        DataError: As ``iter_json`` and ``iter_json_lines``.
    """
    return iter_json_lines(path, on_malformed) if is_json_lines(path) else iter_json(path, on_malformed)
