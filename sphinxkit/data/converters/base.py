"""Common parts of all converters: sources, yielded samples and error reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from sphinxkit.data.json_stream import JsonItem, OnMalformed, is_finite_number
from sphinxkit.errors import DataError
from sphinxkit.formatters.tasks.coordinates import check_box
from sphinxkit.geometry import Box, ImageGeometry

LISTED = 100  # malformed records that a summary keeps in memory; all of them are counted and written out


class RecordError(Exception):
    """One record cannot be used; the message says what was found and what was expected."""


@dataclass(frozen=True, slots=True)
class Source:
    """Input of a converter.

    Args:
        path: The annotation file or folder.
        companion: Second file, if the format has one (VQAv2's annotations, Visual Genome's image_data.json).
        split: Read only this split, if the format's records name one.
    """

    path: Path
    companion: Path | None = None
    split: str | None = None

    def need_companion(self, what: str) -> Path:
        """The second file.

        Raises:
            DataError: There is none.
        """
        if self.companion is None:
            raise DataError(f"{self.path}: {what} is needed as well: give it as the companion")
        return self.companion


@dataclass(frozen=True, slots=True)
class Malformed:
    """A record that was left out: its file, its line (0: unknown) and the reason."""

    file: str
    line: int
    reason: str


@dataclass(slots=True)
class Problems:
    """Counts unusable records and lists the first ones.

    Args:
        strict: Raise at the first unusable record.
        sink: Called with each record.
    """

    strict: bool = False
    sink: Callable[[Malformed], None] | None = None
    count: int = 0
    listed: list[Malformed] = field(default_factory=list)

    def add(self, file: str | Path, line: int, reason: str) -> None:
        """Report one record.

        Raises:
            DataError: ``strict``.
        """
        if self.strict:
            raise DataError(f"{file}:{line}: {reason}")
        reason = reason if is_writable(reason) else ascii(reason)[1:-1]
        problem = Malformed(str(file), line, reason)
        self.count += 1
        if len(self.listed) < LISTED:
            self.listed.append(problem)
        if self.sink is not None:
            self.sink(problem)

    def on(self, file: str | Path) -> OnMalformed:
        """What the JSON readers take as ``on_malformed`` for one file."""
        return lambda line, reason: self.add(file, line, reason)


@dataclass(frozen=True, slots=True)
class Converted:
    """One sample of a task, before formatting.

    Args:
        id: Unique within the source.
        image: Path of the image, relative to the image folder; "" for a text.
        sample: The task's own sample, or a conversation's messages.
        file: Source file, for reports.
        line: Source line; 0: unknown.
    """

    id: str
    image: str
    sample: Any
    file: Path
    line: int


Converter = Callable[[Source, Problems], Iterator[Converted]]
Samples = Iterable[tuple[str, str, Any]]
"""(id, image, sample) of each sample that a record holds."""


def convert_each(
    path: Path,
    items: Iterable[JsonItem],
    problems: Problems,
    make: Callable[[JsonItem, dict[str, Any]], Samples],
    *names: str,
) -> Iterator[Converted]:
    """The samples of every record of a file; a record that cannot be used is reported.

    Args:
        path: The file, for reports.
        items: Its records.
        problems: Collects unusable records.
        make: The samples of a record.
        names: Fields that name a record in reports; without any, its key does.
    """
    for item in items:
        try:
            for sample_id, image, sample in make(item, an_object(item.value)):
                yield Converted(sample_id, image, sample, path, item.line)
        except RecordError as error:
            name = name_of(item.value, *names) or ("" if item.key is None else f"{item.key}: ")
            problems.add(path, item.line, f"{name}{error}")


def an_object(value: Any) -> dict[str, Any]:
    """The value as a JSON object.

    Raises:
        RecordError: It is something else.
    """
    if not isinstance(value, dict):
        raise RecordError(f"expected an object, got {type(value).__name__}")
    return value


def name_of(value: Any, *keys: str) -> str:
    """Prefix for error messages such as ``"id 5: "``; "" if the record is not an object or has no such field.

    It is needed because a whole file may be one line.

    Args:
        value: The record.
        keys: Fields that name the record; the first one present is used.
    """
    found = next((key for key in keys if isinstance(value, dict) and value.get(key) is not None), None)
    return "" if found is None else f"{found} {value[found]!s:.60}: "


def a_list(record: dict[str, Any], key: str) -> list[Any]:
    """``record[key]`` as a list.

    Raises:
        RecordError: It is missing or something else.
    """
    value = record.get(key)
    if not isinstance(value, list):
        raise RecordError(f"{key!r} must be a list, got {value!r:.60}")
    return value


def is_writable(text: str) -> bool:
    """Whether text can be written as UTF-8: JSON may hold half of a surrogate pair, which cannot."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def a_text(record: dict[str, Any], key: str) -> str:
    """``record[key]`` as text that is not empty; numbers are written out.

    Raises:
        RecordError: It is missing, empty or something else.
    """
    value = record.get(key)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise RecordError(f"{key!r} must be a text that is not empty, got {value!r:.60}")
    return value.strip()


def texts_of(record: dict[str, Any], key: str) -> list[str]:
    """``record[key]`` as a list of texts with at least one; see ``a_text``.

    Raises:
        RecordError: It is something else.
    """
    texts = [a_text({key: text}, key) for text in a_list(record, key)]
    if not texts:
        raise RecordError(f"{key!r} is empty")
    return texts


def most_frequent(answers: Iterable[str]) -> str:
    """The answer that most people gave, the first of those."""
    return Counter(answers).most_common(1)[0][0]


def last_parts(url: str, count: int = 2) -> str:
    """The last ``count`` parts of the path of a URL or file name.

    Raises:
        RecordError: It is no URL.
    """
    try:
        path = urlsplit(url).path
    except ValueError as error:
        raise RecordError(f"not a URL: {url!r:.80}") from error
    return "/".join(PurePosixPath(path).parts[-count:])


def a_number(record: dict[str, Any], key: str) -> float:
    """``record[key]`` as a finite number.

    Raises:
        RecordError: It is missing or something else.
    """
    value = record.get(key)
    if not is_finite_number(value):
        raise RecordError(f"{key!r} must be a finite number, got {value!r:.60}")
    return float(value)


def an_id(record: dict[str, Any], key: str) -> int | str:
    """``record[key]`` as an integer or a text.

    Raises:
        RecordError: It is missing or something else.
    """
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise RecordError(f"{key!r} must be an integer or a text, got {value!r:.60}")
    if isinstance(value, str) and not is_writable(value):
        raise RecordError(f"{key!r} holds half of a surrogate pair: {value!a:.60}")
    return value


def a_size(record: dict[str, Any]) -> tuple[int, int]:
    """(width, height) of a record in pixels, both positive.

    Raises:
        RecordError: One is missing or not positive.
    """
    width, height = a_number(record, "width"), a_number(record, "height")
    if width < 1 or height < 1:
        raise RecordError(f"width and height must be positive, got {width:g}x{height:g}")
    return int(width), int(height)


def box_of(values: Any, geometry: ImageGeometry) -> Box:
    """A box from [x, y, width, height] in pixels.

    Raises:
        RecordError: It is no such list, is empty, or leaves the image by more than rounding.
    """
    if not isinstance(values, list) or len(values) != 4:
        raise RecordError(f"the box must be [x, y, width, height], got {values!r:.60}")
    if not all(map(is_finite_number, values)):
        raise RecordError(f"the box must have four finite numbers, got {values!r:.80}")
    x, y, width, height = values
    if width <= 0 or height <= 0:
        raise RecordError(f"the box has no area: {values!r}")
    box = Box(float(x), float(y), float(x + width), float(y + height))
    if box.x1 >= 0 and box.y1 >= 0 and box.x2 <= geometry.width and box.y2 <= geometry.height:
        return box
    try:
        return check_box("convert-data", box, geometry)
    except DataError as error:
        raise RecordError(f"the box {values!r} lies outside the image of {geometry.width}x{geometry.height}") from error
