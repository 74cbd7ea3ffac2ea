"""``sphinxkit generate``: one prompt, one answer; or a file of prompts."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sphinxkit.cli.checkpoints import NANO, tell_checkpoint
from sphinxkit.cli.options import (
    AnswerOptions,
    Checkpoint,
    Json,
    LoadOptions,
    option_groups,
)
from sphinxkit.errors import DataError

if TYPE_CHECKING:
    from sphinxkit.generation import Sampling
    from sphinxkit.sphinx_model import SphinxModel


@option_groups
def generate(
    *,
    checkpoint: Checkpoint = NANO,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The question; with --raw the whole prompt.")
    ] = None,
    image: Annotated[Path | None, typer.Option("--image", "-i", help="Picture that the prompt is about.")] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task", "-t", help="Ask in the wording of a task (rec, detection, pose, ...); see docs/tasks.md."
        ),
    ] = None,
    box: Annotated[
        str | None, typer.Option(help="X1,Y1,X2,Y2 in pixels: the region that --task pose or reg asks about.")
    ] = None,
    draw: Annotated[
        Path | None, typer.Option("--draw", help="Write the picture with the answer's boxes and key points on it.")
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--input", help="JSON lines {prompt, image, ...}; image paths are relative to its folder."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON lines of answers; gone on with if it is there.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of the input that are answered at once.")] = 8,
    num_workers: Annotated[int, typer.Option(min=1, help="Threads that load the input's images.")] = 2,
    raw: Annotated[bool, typer.Option("--raw", help="Do not put the prompt through the chat template.")] = False,
    answering: AnswerOptions,
    stop: Annotated[
        list[str] | None, typer.Option(help="Ends the answer; may be repeated. Default: the template's.")
    ] = None,
    truncate_left: Annotated[bool, typer.Option(help="Shorten an over-long prompt from the left.")] = False,
    loading: LoadOptions,
    as_json: Json = False,
) -> None:
    r"""Answer a prompt, about a picture or without; or all prompts of a file.

    Without a CHECKPOINT it is SPHINX-nano, which comes with sphinxkit.

    With --task, --prompt holds what the task asks about: rec a phrase, detection a category, vqa a question; pose,
    layout, text_detection and grounded_caption take none. --json then also gives what the answer says, in pixels.

    A row of --input may hold id, prompt (or messages), image, max_new_tokens, temperature, top_p, stop, seed and meta,
    which is copied to the answer; row i draws from --seed + i. Answers are written to OUTPUT.rank-0-of-1.part as they
    come, and to OUTPUT in the input's order when all are there. The same command goes on after a kill. With torchrun
    every process takes its share of the rows.

    Examples:

    `sphinxkit generate --image scene.png --prompt "How many circles are there?"`

    `sphinxkit generate --image scene.png --task rec --prompt "the red circle" --draw found.png`

    `sphinxkit generate models/sphinx_1k --image photo.jpg --prompt "What is in the picture?"`

    `sphinxkit generate hf://org/repo -i chart.png -p "Convert this chart to a table." --max-new-tokens 200 --json`

    `sphinxkit generate models/sphinx_1k --input questions.jsonl --output answers.jsonl --batch-size 32`
    """
    is_single = source is None
    named = {"--image": image, "--task": task, "--box": box, "--draw": draw}
    wrong_usage = (
        ((prompt is None) == is_single and not (is_single and task), "give either --prompt or --input", "--prompt"),
        (is_single != (output is None), "--input goes with --output", "--input"),
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
    truncate: Literal["left"] | None = "left" if truncate_left else None
    if source is not None and output is not None:
        from sphinxkit.generation import Sampling

        sampling = Sampling(
            answering.max_new_tokens, answering.temperature, answering.top_p, tuple(stop or ()), answering.seed
        )
        rank, world_size = read_ranks()
        model = dataclasses.replace(loading, device=own_device(loading.device)).load(checkpoint)
        facts = {
            "checkpoint": tell_checkpoint(checkpoint),
            "recipe": loading.recipe,
            "dtype": str(model.dtype),
            "bits": loading.bits,
            "truncate": truncate,
        }
        run: dict[str, Any] = {
            "rank": rank,
            "world_size": world_size,
            "batch_size": batch_size,
            "num_workers": num_workers,
            "num_draft_tokens": answering.num_draft_tokens,
            "truncate": truncate,
        }
        _answer_file(model, source, output, sampling, raw, facts, run, as_json)
        return
    fields = _answer_one(
        checkpoint, loading, Question(prompt, image, task, box, draw, raw), answering, tuple(stop or ()), truncate
    )
    typer.echo(json.dumps(fields, ensure_ascii=False) if as_json else fields["text"].strip())


@dataclasses.dataclass(frozen=True)
class Question:
    """What one prompt is made of; see the options of ``generate``."""

    prompt: str | None
    image: Path | None = None
    task: str | None = None
    box: str | None = None
    draw: Path | None = None
    is_raw: bool = False


def _answer_one(
    checkpoint: str,
    loading: LoadOptions,
    question: Question,
    answering: AnswerOptions,
    stop: tuple[str, ...],
    truncate: Literal["left"] | None,
) -> dict[str, Any]:
    """Answer one prompt, and draw; whatever is wrong with the question is told before the model is loaded."""
    from sphinxkit.cli.drawing import picture_format, read_places, write_drawing
    from sphinxkit.cli.task_prompt import task_instruction
    from sphinxkit.formatters import tasks
    from sphinxkit.geometry import ImageGeometry
    from sphinxkit.tilers import load_image

    if question.prompt is not None and not question.prompt.strip():
        raise DataError("--prompt is empty")
    picture = None if question.image is None else load_image(question.image)
    task = None if question.task is None else tasks.create(question.task)
    words = question.prompt or ""
    if task is not None and picture is not None:
        words = task_instruction(task, question.prompt, question.box, ImageGeometry(*picture.size))
    form = ""
    if question.draw is not None and question.image is not None:
        form = picture_format(question.draw, question.image)
    model = loading.load(checkpoint)
    messages = [{"role": "user", "content": words}]
    text, ends = (words, ()) if question.is_raw else model.chat_prompt(messages)
    if task is not None and task.answer_start and model.conversation is not None:
        text = model.conversation.prompt(messages, task.answer_start)
    [answer] = model.generate(
        [text],
        [picture],
        max_new_tokens=answering.max_new_tokens,
        temperature=answering.temperature,
        top_p=answering.top_p,
        seed=answering.seed,
        stop=stop or ends,
        truncate=truncate,
        num_draft_tokens=answering.num_draft_tokens,
    )
    fields: dict[str, Any] = {
        "prompt": text,
        "image": None if question.image is None else str(question.image),
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
    }
    if answering.num_draft_tokens is not None:
        fields |= {"num_drafted": answer.num_drafted, "num_accepted": answer.num_accepted}
    if picture is not None and (task is not None or question.draw is not None):
        found = read_places(answer.text, picture, task, question.prompt if task is not None else None)
        fields["items"] = [item if isinstance(item, str) else dataclasses.asdict(item) for item in found.items]
        fields["unread"] = [error._asdict() for error in found.failures]
        for error in found.failures:
            typer.echo(f"not read: {error.text!r} ({tasks.FAULTS[error.kind]})", err=True)
        if question.draw is not None:
            typer.echo(write_drawing(question.draw, form, picture, found.items), err=True)
    return fields


def read_ranks() -> tuple[int, int]:
    """This process's rank and how many there are, as torchrun says it; (0, 1) without torchrun.

    Raises:
        DataError: The variables are not numbers.
    """
    try:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError as error:
        raise DataError(f"RANK and WORLD_SIZE in the environment must be numbers: {error}") from error


def own_device(name: str) -> str:
    """The device of this process: with torchrun, ``auto`` and ``cuda`` are the GPU with the process's local rank."""
    import torch

    local = os.environ.get("LOCAL_RANK")
    if local is None or name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    return f"cuda:{local}"


def _answer_file(
    model: SphinxModel,
    source: Path,
    output: Path,
    sampling: Sampling,
    raw: bool,
    facts: dict[str, Any],
    run: dict[str, Any],
    as_json: bool,
) -> None:
    from rich.console import Console

    from sphinxkit.batch_inference import Defaults, answer_file

    with Console(stderr=True).status(f"{source}: reading") as status:
        summary = answer_file(
            model,
            source,
            output,
            Defaults(sampling, raw, facts),
            **run,
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
        return
    rest = "" if summary.is_complete else "; merged when the other processes are done"
    typer.echo(
        f"{summary.num_answered} rows answered, {summary.num_skipped} were before, {summary.num_errors} with an error: "
        f"{summary.output}{rest}"
    )
