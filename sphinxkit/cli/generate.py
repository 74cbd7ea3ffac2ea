"""``sphinxkit generate``: one prompt, one answer; or a file of prompts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sphinxkit.cli.command import common_options
from sphinxkit.cli.completion import complete_names
from sphinxkit.cli.options import (
    AnswerOptions,
    Checkpoint,
    Json,
    LoadOptions,
    option_groups,
)
from sphinxkit.errors import DataError
from sphinxkit.hub import NANO, is_nano

if TYPE_CHECKING:
    from PIL.Image import Image

    from sphinxkit.formatters.tasks import ParseResult, TaskQuestion
    from sphinxkit.generation import Sampling
    from sphinxkit.sphinx_model import SphinxModel


@common_options("prompt", "image", "task", "box", "draw", "source", "output", "max_new_tokens", "device", "as_json")
@option_groups
def generate(
    *,
    checkpoint: Checkpoint = NANO,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The question; with --raw the whole prompt.")
    ] = None,
    image: Annotated[Path | None, typer.Option("--image", "-i", help="Image for the prompt.")] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            "-t",
            help="A task's question, as `sphinxkit list tasks` names it.",
            autocompletion=complete_names("tasks"),
        ),
    ] = None,
    box: Annotated[str | None, typer.Option(help="X1,Y1,X2,Y2 in pixels, for --task pose or reg.")] = None,
    draw: Annotated[Path | None, typer.Option("--draw", help="Write the image with the answer's places drawn.")] = None,
    source: Annotated[
        Path | None,
        typer.Option("--input", help="JSON lines {prompt, image, ...}; image paths are relative to its folder."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON lines of answers; an existing file is resumed.")
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="Folder that the input's images must lie in. Default: its own, and anywhere.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per batch.")] = 8,
    num_workers: Annotated[int, typer.Option(min=1, help="Threads that load the input's images.")] = 2,
    raw: Annotated[bool, typer.Option("--raw", help="Do not apply the chat template.")] = False,
    answering: AnswerOptions,
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop string; may be repeated. Default: the template's.")
    ] = None,
    truncate_left: Annotated[bool, typer.Option(help="Truncate an over-long prompt from the left.")] = False,
    loading: LoadOptions,
    as_json: Json = False,
) -> None:
    """Answer a prompt about an image, or all prompts of a file.

    Without a CHECKPOINT, the built-in SPHINX-nano is used.

    With --task, --prompt is the task's argument: a phrase for rec, a category for detection, a question for vqa; pose,
    layout, text_detection and grounded_caption take none. --json then also prints the parsed items, in pixels.

    A row of --input may hold id, prompt (or messages), image, max_new_tokens, temperature, top_p, stop, seed and meta,
    which is copied to the answer; row i uses seed --seed + i. Answers are written to OUTPUT.rank-0-of-1.part as they
    complete, and at the end to OUTPUT in input order. The same command resumes a stopped run. With torchrun, every
    process answers a share of the rows.

    Examples:
      sphinxkit generate -i scene.png -p "How many circles are there?"
      sphinxkit generate -i scene.png -t rec -p "the red circle" --draw found.png
      sphinxkit generate models/sphinx_1k --input questions.jsonl -o answers.jsonl
    """
    is_single = source is None
    named = {"--image": image, "--task": task, "--box": box, "--draw": draw}
    wrong_usage = (
        ((prompt is None) == is_single and not (is_single and task), "give either --prompt or --input", "--prompt"),
        (is_single != (output is None), "--input goes with --output", "--input"),
        (is_single and root is not None, "--root goes with --input", "--root"),
        (
            not is_single and any(value is not None for value in named.values()),
            f"--input names images in its rows, and goes without {', '.join(named)}",
            "--input",
        ),
        (
            image is None and (task is not None or draw is not None),
            "--task and --draw are about a picture: give --image",
            "--image",
        ),
        (task is None and box is not None, "--box goes with --task", "--box"),
        (task is not None and raw, "--task words the prompt, with --raw you do", "--raw"),
    )
    for is_wrong, message, option in wrong_usage:
        if is_wrong:
            raise typer.BadParameter(message, param_hint=option)
    from sphinxkit.generation import Sampling
    from sphinxkit.nano import unfamiliar
    from sphinxkit.sphinx_model.answers import uncertainty

    truncate: Literal["left"] | None = "left" if truncate_left else None
    sampling = Sampling(
        answering.max_new_tokens, answering.temperature, answering.top_p, tuple(stop or ()), answering.seed
    )
    if source is not None and output is not None:
        model = loading.load(checkpoint)
        options: dict[str, Any] = {
            "root": root,
            "raw": raw,
            "batch_size": batch_size,
            "num_workers": num_workers,
            "num_draft_tokens": answering.num_draft_tokens,
            "truncate": truncate,
        }
        _answer_file(model, source, output, sampling, options, as_json)
        return
    question = read_question(prompt, image, task, box, draw)
    model = loading.load(checkpoint)
    how: dict[str, Any] = {
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "truncate": truncate,
        "num_draft_tokens": answering.num_draft_tokens,
    }
    result: ParseResult[Any] | None = None
    if question.task is not None and question.picture is not None:
        found = model.ask(question.task, question.picture, stop=sampling.stop or None, **how)
        text, answer, result = found.prompt, found.generation, found.result
    else:
        text, ends = (question.words, ()) if raw else model.chat_prompt(question.words)
        [answer] = model.generate([text], [question.picture], stop=sampling.stop or ends, **how)
        if draw is not None:
            result = question.find_places(answer.text)
    fields: dict[str, Any] = {"prompt": text, "image": None if image is None else str(image)}
    # the blank after the prompt's last word belongs to the template; in a raw prompt it is the writer's own
    fields |= {
        "text": answer.text if raw else answer.text.strip(),
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
    }
    doubts = [uncertainty(model.conversation, answer.confidence)]
    if is_nano(checkpoint) and question.picture is not None:
        doubts.insert(0, unfamiliar(model, question.picture))
    fields |= {"confidence": answer.confidence}
    if note := "; ".join(filter(None, doubts)):
        fields["note"] = note
        typer.echo(f"note: {note}", err=True)
    if answering.num_draft_tokens is not None:
        fields |= {"num_drafted": answer.num_drafted, "num_accepted": answer.num_accepted}
    if result is not None:
        fields |= _show_places(result, question, draw)
    typer.echo(json.dumps(fields, ensure_ascii=False) if as_json else answer.text.strip())
    if result is not None and task is not None and result.failures and not result.items:
        raise typer.Exit(1)


@dataclasses.dataclass(frozen=True)
class _Question:
    """What the options ask."""

    words: str
    picture: Image | None
    task: TaskQuestion | None

    def find_places(self, answer: str) -> ParseResult[Any]:
        """Find boxes and points in an answer without a task's parser."""
        from sphinxkit.formatters.draw import find_places
        from sphinxkit.geometry import ImageGeometry

        if self.picture is None:
            raise DataError("--draw: there is no picture to draw on")
        return find_places(answer, ImageGeometry(*self.picture.size))


def read_question(
    prompt: str | None, image: Path | None, task: str | None, box: str | None, draw: Path | None
) -> _Question:
    """Build the question from the options; errors are raised before a model is loaded."""
    from sphinxkit.cli.task_options import read_task
    from sphinxkit.formatters.draw import check_target
    from sphinxkit.geometry import ImageGeometry
    from sphinxkit.tilers import load_image

    if prompt is not None and not prompt.strip():
        raise DataError("--prompt is empty")
    picture = None if image is None else load_image(image)
    question = None
    if task is not None and picture is not None:
        question = read_task(task, prompt, box, ImageGeometry(*picture.size))
    if draw is not None:
        check_target(draw, image)
    return _Question(prompt or "", picture, question)


def _show_places(result: ParseResult[Any], question: _Question, draw: Path | None) -> dict[str, Any]:
    """Draw an answer's items; returns them as JSON data."""
    from sphinxkit.formatters import tasks
    from sphinxkit.formatters.draw import count_places, label_boxes, save_drawing

    items = label_boxes(result.items, "" if question.task is None else question.task.label)
    for error in result.failures:
        typer.echo(f"not read: {error.text!r} ({tasks.ERROR_KINDS[error.kind]})", err=True)
    if draw is not None and question.picture is not None:
        save_drawing(draw, question.picture, items)
        places = count_places(items)
        told = f"{places} drawn" if places else "the answer holds nothing to draw, the picture is as it was"
        typer.echo(f"{draw}: {told}", err=True)
    return {
        "items": [item if isinstance(item, str) else dataclasses.asdict(item) for item in items],
        "unread": [error._asdict() for error in result.failures],
    }


def _answer_file(
    model: SphinxModel, source: Path, output: Path, sampling: Sampling, options: dict[str, Any], as_json: bool
) -> None:
    from rich.console import Console

    from sphinxkit.batch_inference import answer_file

    with Console(stderr=True).status(f"{source}: reading") as status:
        summary = answer_file(
            model,
            source,
            output,
            sampling,
            **options,
            progress=lambda done, total: status.update(f"{source}: {done} of {total} rows done"),
        )
    if as_json:
        fields = {
            "rows": summary.num_rows,
            "answered": summary.num_answered,
            "errors": summary.num_errors,
            "skipped": summary.num_skipped,
            "output": str(summary.output),
            "complete": summary.is_complete,
        }
        typer.echo(json.dumps(fields, ensure_ascii=False))
    else:
        rest = "" if summary.is_complete else "; merged when the other processes are done"
        typer.echo(
            f"{summary.num_answered} rows answered, {summary.num_skipped} were before, {summary.num_errors} with an "
            f"error: {summary.output}{rest}"
        )
    if summary.num_errors:
        raise typer.Exit(1)
