"""``sphinxkit generate``: one prompt, one answer; or a file of prompts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sphinxkit.cli.options import (
    Checkpoint,
    Device,
    Dtype,
    Json,
    LlamaType,
    NoVerify,
    RecipeOption,
    Replicas,
    load_model,
)
from sphinxkit.errors import DataError

if TYPE_CHECKING:
    from sphinxkit.generation import Sampling
    from sphinxkit.sphinx_model import SphinxModel


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The question; with --raw the whole prompt.")
    ] = None,
    image: Annotated[Path | None, typer.Option("--image", "-i", help="Picture that the prompt is about.")] = None,
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
    max_new_tokens: Annotated[int, typer.Option(help="At most this many tokens.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus of the sampling.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable; row i of an input adds i.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Ends the answer; may be repeated. Default: the template's.")
    ] = None,
    truncate_left: Annotated[bool, typer.Option(help="Shorten an over-long prompt from the left.")] = False,
    speculate: Annotated[
        int | None, typer.Option(min=1, help="Draft up to this many tokens by prompt lookup (greedy only).")
    ] = None,
    recipe: RecipeOption = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    no_verify: NoVerify = False,
    replicas: Replicas = "equal",
    llama_type: LlamaType = None,
    as_json: Json = False,
) -> None:
    r"""Answer a prompt, about a picture or without; or all prompts of a file.

    A row of --input may hold id, prompt (or messages), image, max_new_tokens, temperature, top_p, stop, seed and meta,
    which is copied to the answer. Answers are written to OUTPUT.rank-0-of-1.part as they come, and to OUTPUT in the
    input's order when all are there. The same command goes on after a kill. With torchrun every process takes its
    share of the rows.

    Examples:

    `sphinxkit generate models/sphinx_1k --image photo.jpg --prompt "What is in the picture?"`

    `sphinxkit generate hf://org/repo -i chart.png -p "Convert this chart to a table." --max-new-tokens 200 --json`

    `sphinxkit generate models/sphinx_1k --input questions.jsonl --output answers.jsonl --batch-size 32`
    """
    from sphinxkit.generation import Sampling
    from sphinxkit.tilers import load_image

    if (prompt is None) == (source is None):
        raise typer.BadParameter("give either --prompt or --input", param_hint="--prompt")
    if (source is None) != (output is None) or (source is not None and image is not None):
        raise typer.BadParameter("--input goes with --output, and names images in its rows", param_hint="--input")
    sampling = Sampling(max_new_tokens, temperature, top_p, tuple(stop or ()), seed)
    truncate: Literal["left"] | None = "left" if truncate_left else None
    if source is not None and output is not None:
        rank, world_size = read_ranks()
        model = load_model(checkpoint, recipe, own_device(device), dtype, no_verify, replicas, llama_type)
        facts = {"checkpoint": checkpoint, "recipe": recipe, "dtype": str(model.dtype), "truncate": truncate}
        run: dict[str, Any] = {
            "rank": rank,
            "world_size": world_size,
            "batch_size": batch_size,
            "num_workers": num_workers,
            "speculate": speculate,
            "truncate": truncate,
        }
        _answer_file(model, source, output, sampling, raw, facts, run, as_json)
        return
    question = prompt or ""
    if not question.strip():
        raise DataError("--prompt is empty")
    picture = None if image is None else load_image(image)  # a wrong picture is told before the model is loaded
    model = load_model(checkpoint, recipe, device, dtype, no_verify, replicas, llama_type)
    text, ends = (question, ()) if raw else model.chat_prompt([{"role": "user", "content": question}])
    [answer] = model.generate(
        [text],
        [picture],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=tuple(stop) if stop else ends,
        truncate=truncate,
        speculate=speculate,
    )
    if as_json:
        fields: dict[str, Any] = {
            "prompt": text,
            "image": None if image is None else str(image),
            "text": answer.text,
            "token_ids": answer.token_ids,
            "finish_reason": answer.finish_reason,
        }
        if speculate is not None:
            fields |= {"num_drafted": answer.num_drafted, "num_accepted": answer.num_accepted}
        typer.echo(json.dumps(fields, ensure_ascii=False))
    else:
        typer.echo(answer.text.strip())


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
