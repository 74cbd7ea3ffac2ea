"""Files of a run: one part per rank while it runs, then one file in input order.

``OUT.rank-R-of-W.part`` holds the answers of rank R of W, one line per row in order of completion, while the rank runs
or after it was stopped; ``OUT.rank-R-of-W.done`` is the part of a finished rank. The last rank to finish merges
everything into ``OUT`` and removes the parts.
"""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from sphinxkit.atomic import atomic_file
from sphinxkit.errors import DataError

READ_ATTEMPTS = 10  # other ranks may rename or merge parts while this one reads; our choice


@dataclass(frozen=True, slots=True)
class Line:
    """One line of an output file.

    Args:
        index: Number of the row.
        digest: Hash of the request.
        is_error: Whether the row failed.
        text: The line, without its newline.
    """

    index: int
    digest: str
    is_error: bool
    text: bytes


def part_path(output: str | Path, rank: int, world_size: int, is_done: bool = False) -> Path:
    """Path of a rank's part.

    Args:
        output: The final file.
        rank: From 0.
        world_size: Number of ranks.
        is_done: Whether the rank has finished.
    """
    output = Path(output)
    return output.with_name(f"{output.name}.rank-{rank}-of-{world_size}.{'done' if is_done else 'part'}")


def find_parts(output: Path) -> list[Path]:
    """Find existing parts, of this run and of earlier runs with any number of ranks."""
    pattern = re.compile(re.escape(output.name) + r"\.rank-\d+-of-\d+\.(part|done)")
    siblings = output.parent.iterdir() if output.parent.is_dir() else iter(())
    return sorted(path for path in siblings if pattern.fullmatch(path.name))


def make_line(fields: dict[str, Any]) -> bytes:
    """Serialise a line with its newline, in valid UTF-8; lone surrogates become JSON escapes."""
    return json.dumps(fields, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def read_part(path: Path) -> Iterator[Line]:
    """Read the complete lines of an output file or a part; a last line without a newline is ignored.

    Raises:
        DataError: A line is damaged or was not written by this command.
    """
    content = path.read_bytes()
    for number, text in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            fields = json.loads(text)
            yield Line(int(fields["index"]), str(fields["request"]), "error" in fields, text)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DataError(
                f"{path}, line {number}: not an answer of this command ({type(error).__name__}: {error}); choose "
                "another output, or remove the file"
            ) from error


def read_answers(output: Path) -> dict[int, Line]:
    """Collect the answers in ``output`` and all parts; an answer takes precedence over an error."""
    for _ in range(READ_ATTEMPTS):
        found: dict[int, Line] = {}
        try:
            for path in [*([output] if output.is_file() else []), *find_parts(output)]:
                for line in read_part(path):
                    if line.index not in found or not line.is_error:
                        found[line.index] = line
        except FileNotFoundError:  # another rank has just finished
            continue
        return found
    raise DataError(f"{output}: its parts are renamed and removed while they are read; is another run at work on it?")


@contextmanager
def open_part(output: Path, rank: int, world_size: int) -> Iterator[BinaryIO]:
    """Open and lock this rank's part for appending; a half-written last line is removed.

    Raises:
        DataError: Another process is writing it.
    """
    part, done = (part_path(output, rank, world_size, is_done) for is_done in (False, True))
    part.parent.mkdir(parents=True, exist_ok=True)
    if done.exists() and not part.exists():
        done.rename(part)
    with part.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"{part}: another process is writing it; processes that share an input need a RANK of their own "
                "(torchrun sets it)"
            ) from error
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        yield file


def finish_part(output: Path, rank: int, world_size: int, num_rows: int) -> bool:
    """Mark this rank as finished, and merge if it was the last.

    Returns:
        Whether ``output`` is complete.
    """
    done = [part_path(output, number, world_size, is_done=True) for number in range(world_size)]
    part_path(output, rank, world_size).replace(done[rank])
    if not all(path.exists() for path in done):
        return False
    answers = read_answers(output)
    parts = find_parts(output)
    if any(index not in answers for index in range(num_rows)):
        return False
    if parts:  # else another rank was faster
        with atomic_file(output) as temporary:
            temporary.write_bytes(b"".join(answers[index].text + b"\n" for index in range(num_rows)))
        for path in parts:
            path.unlink(missing_ok=True)
    return True
