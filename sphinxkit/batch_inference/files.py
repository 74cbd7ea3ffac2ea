"""Answers a file of prompts row by row, in several processes, and resumes after a stop."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sphinxkit.atomic import named_errors
from sphinxkit.batch_inference.fingerprint import fingerprint
from sphinxkit.batch_inference.loop import Answer, answer_requests
from sphinxkit.batch_inference.rank_files import Line, finish_part, make_line, open_part, part_path, read_answers
from sphinxkit.batch_inference.requests import BadRow, Defaults, Request, parse_request, read_lines
from sphinxkit.errors import DataError
from sphinxkit.generation import Sampling

if TYPE_CHECKING:
    from sphinxkit.sphinx_model import SphinxModel


@dataclass(frozen=True, slots=True)
class Summary:
    """Result of one rank.

    Args:
        num_rows: Rows of the whole input.
        num_answered: Rows that this rank answered in this run.
        num_errors: Rows of this rank without an answer, including earlier runs.
        num_skipped: Rows of this rank that earlier runs answered.
        output: Where this rank's answers are: the output file if it is complete, else the rank's part.
        is_complete: Whether the output holds the rows of all ranks, in input order.
    """

    num_rows: int
    num_answered: int
    num_errors: int
    num_skipped: int
    output: Path
    is_complete: bool


def answer_file(
    model: SphinxModel,
    source: str | Path,
    output: str | Path,
    sampling: Sampling | None = None,
    *,
    root: str | Path | None = None,
    raw: bool = False,
    rank: int | None = None,
    world_size: int | None = None,
    batch_size: int = 8,
    num_workers: int = 2,
    num_draft_tokens: int | None = None,
    truncate: Literal["left"] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Answer the rows of a JSON lines file.

    A line of the output is ``{"index", "id", "text", "token_ids", "finish_reason", "meta", "request"}``, or
    ``{"index", "id", "error", "request"}`` for a failed row; ``id`` and ``meta`` appear if the row has them. Each line
    is written and flushed to the rank's own part file (see ``rank_files``) when its row is complete. When all ranks are
    done, the output file holds all rows in input order.

    A second run repairs a half-written last line and answers the missing rows, with any number of ranks. Rows whose
    image or prompt failed are tried again. Malformed rows are tried again only if they have changed. Rows added to the
    input are answered. It is an error if an answered row has changed, or if the model or the settings differ.

    Args:
        model: Must have a tokenizer.
        source: JSON lines file; see ``requests.FIELDS``.
        output: JSON lines file to write.
        sampling: Defaults for rows. With a ``seed``, row i uses ``seed + i``; without ``stop``, the template's stop
            strings apply. None: ``Sampling()``.
        root: Folder that image paths must lie in, links followed; other rows are errors. None: they are relative to the
            folder of ``source``, and may lead out of it.
        raw: Do not apply the chat template to prompts.
        rank: This process; it answers rows ``rank, rank + world_size, ...``. None: torchrun's rank, else 0.
        world_size: Processes that share the file, each with its own model and the same file system.
            None: torchrun's, else 1.
        batch_size: See ``answer_requests``.
        num_workers: See ``answer_requests``.
        num_draft_tokens: See ``answer_requests``.
        truncate: See ``answer_requests``.
        progress: Called with (finished rows of this rank, all rows of this rank).
    Raises:
        DataError: The input cannot be read, is no regular file or has no rows; ``root`` is no folder; the output is the
            input file, is not an output of this command, belongs to other requests, is being written by another
            process, or cannot be written; ``rank`` is not below ``world_size``; or as ``answer_requests``.
    """
    source, output = Path(source), Path(output)
    rank = _from_torchrun("RANK", 0) if rank is None else rank
    world_size = _from_torchrun("WORLD_SIZE", 1) if world_size is None else world_size
    if not 0 <= rank < world_size:
        raise DataError(f"rank {rank} is not one of {world_size} (from 0)")
    if root is not None and not Path(root).is_dir():
        raise DataError(f"root {root}: there is no such folder")
    if source.resolve() == output.resolve():
        raise DataError(f"output {output} is the input")
    if source.exists() and not (source.is_file() or source.is_dir()):
        raise DataError(f"input {source}: is a pipe or a device; it is read more than once: give a regular file")
    num_rows = sum(1 for _ in read_lines(source))
    if not num_rows:
        raise DataError(f"input {source}: there are no rows")
    with named_errors(output):
        answers = read_answers(output)
    beyond = [index for index in answers if index >= num_rows]
    if beyond:
        raise DataError(f"output {output} answers row {beyond[0]}, but {source} has {num_rows} rows")
    facts = {**fingerprint(model), "truncate": truncate}
    defaults = Defaults(Sampling() if sampling is None else sampling, raw, facts)
    run = _Run(model, source, output, defaults, rank, world_size, answers, None if root is None else Path(root))
    answers.clear()  # the texts are not needed any more
    total = len(range(rank, num_rows, world_size))
    with named_errors(output), open_part(output, rank, world_size) as file:

        def write(fields: dict[str, Any]) -> None:
            try:
                line = make_line(fields)
            except RecursionError:
                error = f"row {fields['index']}: its meta is nested too deeply to be written"
                line = make_line({"index": fields["index"], "error": error, "request": fields["request"]})
            file.write(line)
            file.flush()
            if progress is not None:
                progress(run.num_skipped + run.num_answered + run.num_errors, total)

        for answered in answer_requests(
            model,
            run.requests(write),
            batch_size=batch_size,
            num_workers=num_workers,
            num_draft_tokens=num_draft_tokens,
            truncate=truncate,
        ):
            write(run.fields(answered))
        os.fsync(file.fileno())
    with named_errors(output):
        is_complete = finish_part(output, rank, world_size, num_rows)
    where = output if is_complete else part_path(output, rank, world_size, is_done=True)
    return Summary(num_rows, run.num_answered, run.num_errors, run.num_skipped, where, is_complete)


def _from_torchrun(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    try:
        return int(value)
    except ValueError as error:
        raise DataError(f"{name} in the environment must be a number, got {value!r}") from error


class _Run:
    """Remaining and finished work of one rank."""

    def __init__(
        self,
        model: SphinxModel,
        source: Path,
        output: Path,
        defaults: Defaults,
        rank: int,
        world_size: int,
        answers: dict[int, Line],
        root: Path | None,
    ) -> None:
        self._model, self._source, self._output, self._defaults = model, source, output, defaults
        self._rank, self._world_size = rank, world_size
        self._folder, self._is_root = root or source.parent, root is not None
        self._known = {index: (line.digest, line.is_error) for index, line in answers.items()}
        self.num_answered = self.num_errors = self.num_skipped = 0

    def requests(self, report: Callable[[dict[str, Any]], None]) -> Iterator[Request]:
        """Yield this rank's unanswered rows and report malformed ones."""
        for index, line in read_lines(self._source):
            if index % self._world_size != self._rank:
                continue
            request = parse_request(
                index, line, self._defaults, self._model.chat_prompt, self._folder, is_root=self._is_root
            )
            digest, is_error = self._known.get(index, (None, True))
            if not is_error and digest != request.digest:
                raise DataError(
                    f"output {self._output} answers another request than row {index} of {self._source}: the row, the "
                    "options or the model have changed since; choose another output, or remove the old one"
                )
            if isinstance(request, BadRow):
                self.num_errors += 1
                if digest != request.digest:
                    report(_named(index, request.id) | {"error": request.error, "request": request.digest})
            elif is_error:
                yield request
            else:
                self.num_skipped += 1

    def fields(self, answered: Answer) -> dict[str, Any]:
        """Fields of an answer's output line."""
        request = answered.request
        fields = _named(request.index, request.id)
        if answered.generation is None:
            self.num_errors += 1
            fields["error"] = f"row {request.index}: {answered.error}"
        else:
            self.num_answered += 1
            text = answered.generation.text
            fields["text"] = text if request.is_raw else text.strip()
            fields["token_ids"] = answered.generation.token_ids
            fields["finish_reason"] = answered.generation.finish_reason
        if request.meta is not None:
            fields["meta"] = request.meta
        return fields | {"request": request.digest}


def _named(index: int, name: str | int | None) -> dict[str, Any]:
    return {"index": index} if name is None else {"index": index, "id": name}
