"""Rows of the input file: JSON lines, each one prompt."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sphinxkit.errors import DataError
from sphinxkit.generation import Sampling, stop_strings
from sphinxkit.sphinx_model.images import ImageInput

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
    """What holds for the rows that do not say otherwise.

    Args:
        sampling: With a ``seed``, row i of the file draws from ``seed + i``. Without ``stop`` the template's holds.
        is_raw: Prompts are not put through the chat template.
        facts: What else an answer depends on (the model, its dtype): a run with other facts does not continue answers.
    """

    sampling: Sampling = field(default_factory=Sampling)
    is_raw: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Request:
    """One row of the input.

    Args:
        index: Which one, blank lines not counted, from 0.
        prompt: As the model is to read it.
        image: What it is about; of a row, a file.
        sampling: How it is answered.
        id: The row's own name.
        meta: Anything; it is copied to the answer.
        digest: Tells this request from others.
    """

    index: int
    prompt: str
    image: ImageInput | None = None
    sampling: Sampling = field(default_factory=Sampling)
    id: str | int | None = None
    meta: Any = None
    digest: str = ""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is not a request.

    Args:
        index: Which one.
        error: What is wrong with it.
        id: The row's own name, if it has one.
        digest: Tells this line from others: it is not reported again as long as it stays as it is.
    """

    index: int
    error: str
    id: str | int | None = None
    digest: str = ""


def read_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """The rows of a JSON lines file as they stand there, numbered from 0; blank lines are left out.

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
    index: int, line: bytes, defaults: Defaults, chat_prompt: ChatPrompt, folder: Path
) -> Request | BadRow:
    """One row; or what is wrong with it.

    Args:
        index: Of the row.
        line: JSON object with ``prompt`` or ``messages``, and any of ``FIELDS``; or a row of LLaVA's question files.
        defaults: For what the row does not say.
        chat_prompt: ``SphinxModel.chat_prompt``.
        folder: That image paths are relative to.
    """
    name: str | int | None = None
    try:
        row = _read_object(line)
        if isinstance(row.get("id"), str | int):
            name = row["id"]
        return _request(index, row, defaults, chat_prompt, folder)
    except DataError as error:
        digest = hashlib.sha256(line).hexdigest()[:16]
        return BadRow(index, f"row {index}: {error}", name, digest)


def _read_object(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except RecursionError as error:
        raise DataError("not JSON that can be read: nested too deeply") from error
    except ValueError as error:  # UnicodeDecodeError is one, too
        raise DataError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"expected a JSON object, got {type(row).__name__}")
    if "question_id" in row and "prompt" not in row and "messages" not in row:
        row = {LLAVA_FIELDS.get(key, key): value for key, value in row.items() if key not in LLAVA_IGNORED}
    return row


def _request(index: int, row: dict[str, Any], defaults: Defaults, chat_prompt: ChatPrompt, folder: Path) -> Request:
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
    image = folder / row["image"] if "image" in row else None
    told = [prompt, row.get("image"), dataclasses.asdict(sampling), dict(defaults.facts), row.get("id")]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
    return Request(index, prompt, image, sampling, row.get("id"), row.get("meta"), digest)


def _prompt(row: dict[str, Any], is_raw: bool, chat_prompt: ChatPrompt) -> tuple[str, tuple[str, ...]]:
    if "messages" in row:
        return chat_prompt(row["messages"])
    if is_raw:
        return row["prompt"], ()
    return chat_prompt([{"role": "user", "content": row["prompt"]}])
