"""Rows of the input file: JSON lines, each one prompt."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sphinxkit.errors import DataError
from sphinxkit.generation import Sampling, stop_strings
from sphinxkit.sphinx_model.images import ImageInput
from sphinxkit.tilers import image_below

ChatPrompt = Callable[[Any], tuple[str, tuple[str, ...]]]

# What a row may hold, and as what.
FIELDS: dict[str, tuple[type, ...]] = {
    "id": (str, int),
    "prompt": (str,),
    "messages": (list,),
    "image": (str,),
    "max_new_tokens": (int,),
    "temperature": (int, float),
    "top_p": (int, float),
    "stop": (str, list),
    "seed": (int,),
    "meta": (),
}
# Names that LLaVA's question files have for the same (``category`` is for the reader). Source: LLaVA,
# docs/Evaluation.md.
LLAVA_FIELDS = {"question_id": "id", "text": "prompt"}
LLAVA_IGNORED = frozenset({"category"})


@dataclass(frozen=True, slots=True)
class Defaults:
    """Defaults for the rows.

    Args:
        sampling: Sampling options. With a ``seed``, row i of the file uses ``seed + i``. Without ``stop``, the
            template's stop strings apply.
        is_raw: Do not apply the chat template to prompts.
        facts: Further facts that answers depend on (model, dtype); a run with other facts cannot be resumed.
    """

    sampling: Sampling = field(default_factory=Sampling)
    is_raw: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Request:
    """One row of the input.

    Args:
        index: Row number from 0; blank lines are not counted.
        prompt: The full prompt.
        image: The image; in a file's row, a path.
        sampling: Sampling options.
        id: The row's ``id``.
        meta: Any value; copied to the answer.
        digest: Hash of the request.
        is_raw: The prompt is the writer's own, without a chat template.
    """

    index: int
    prompt: str
    image: ImageInput | None = None
    sampling: Sampling = field(default_factory=Sampling)
    id: str | int | None = None
    meta: Any = None
    digest: str = ""
    is_raw: bool = False


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is not a request.

    Args:
        index: Row number.
        error: What is wrong with the row.
        id: The row's ``id``, if it has one.
        digest: Hash of the line; an unchanged line is not reported again.
    """

    index: int
    error: str
    id: str | int | None = None
    digest: str = ""


def read_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Read the raw rows of a JSON lines file, numbered from 0; blank lines are skipped.

    Args:
        path: Of the file.
    Raises:
        DataError: It cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            index = 0
            for line in file:
                if line.strip():
                    yield index, line.strip()
                    index += 1
    except OSError as error:
        raise DataError(f"input {path}: cannot be read: {error.strerror}") from error


def parse_request(
    index: int, line: bytes, defaults: Defaults, chat_prompt: ChatPrompt, folder: Path, *, is_root: bool = False
) -> Request | BadRow:
    """Parse one row to a request, or to a ``BadRow`` that says what is wrong.

    Args:
        index: Row number.
        line: JSON object with ``prompt`` or ``messages``, and any of ``FIELDS``; or a row of LLaVA's question files.
        defaults: Values for fields that the row lacks.
        chat_prompt: ``SphinxModel.chat_prompt``.
        folder: Base folder of image paths.
        is_root: Whether images must lie in ``folder``, links followed.
    """
    name: str | int | None = None
    try:
        row = _read_object(line)
        if isinstance(row.get("id"), str | int):
            name = row["id"]
        return _request(index, row, defaults, chat_prompt, folder, is_root)
    except DataError as error:
        digest = hashlib.sha256(line).hexdigest()[:16]
        return BadRow(index, f"row {index}: {error}", name, digest)


def _finite(text: str) -> float:
    """A number of JSON; NaN and what no float holds (1e400) would be written back as words that are not JSON."""
    if math.isfinite(value := float(text)):
        return value
    raise ValueError(f"{text:.20} is no finite number")


def _read_object(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line, parse_float=_finite, parse_constant=_finite)
    except RecursionError as error:
        raise DataError("not JSON that can be read: nested too deeply") from error
    except ValueError as error:  # UnicodeDecodeError is one, too
        raise DataError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"expected a JSON object, got {type(row).__name__}")
    if "question_id" in row and "prompt" not in row and "messages" not in row:
        row = {LLAVA_FIELDS.get(key, key): value for key, value in row.items() if key not in LLAVA_IGNORED}
    return row


def _request(
    index: int, row: dict[str, Any], defaults: Defaults, chat_prompt: ChatPrompt, folder: Path, is_root: bool
) -> Request:
    unknown = sorted(set(row) - set(FIELDS))
    if unknown:
        raise DataError(f"unknown field {unknown[0]!r}; there are {', '.join(FIELDS)} (meta is copied to the answer)")
    row = {key: value for key, value in row.items() if value is not None}
    for key, value in row.items():
        kinds = FIELDS[key]
        if kinds and (not isinstance(value, kinds) or isinstance(value, bool)):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise DataError(f"{key}: expected {expected}, got {type(value).__name__}")
    stop = row.get("stop", defaults.sampling.stop)
    if not isinstance(stop, str) and not all(isinstance(text, str) for text in stop):
        raise DataError("stop: expected a string or a list of strings")
    if ("prompt" in row) == ("messages" in row):
        raise DataError("expected either prompt or messages")
    prompt, ends = _prompt(row, defaults.is_raw, chat_prompt)
    if not prompt.strip() and "image" not in row:
        raise DataError("the prompt is empty, and there is no image")
    seed = None if defaults.sampling.seed is None else defaults.sampling.seed + index
    own = {key: row[key] for key in ("max_new_tokens", "temperature", "top_p") if key in row}
    stop = stop_strings(stop) if "stop" in row or stop else ends
    sampling = dataclasses.replace(defaults.sampling, **own, seed=row.get("seed", seed), stop=stop)
    image = None
    if "image" in row:
        image = image_below(folder, row["image"], follow_links=False) if is_root else folder / row["image"]
    told = [prompt, row.get("image"), dataclasses.asdict(sampling), dict(defaults.facts), row.get("id")]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
    is_raw = defaults.is_raw and "prompt" in row
    return Request(index, prompt, image, sampling, row.get("id"), row.get("meta"), digest, is_raw)


def _prompt(row: dict[str, Any], is_raw: bool, chat_prompt: ChatPrompt) -> tuple[str, tuple[str, ...]]:
    if "messages" in row:
        return chat_prompt(row["messages"])
    if is_raw:
        return row["prompt"], ()
    return chat_prompt([{"role": "user", "content": row["prompt"]}])
