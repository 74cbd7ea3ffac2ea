"""``sphinxkit chat``: a conversation in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sphinxkit.cli.options import Checkpoint, Device, Dtype, LlamaType, NoVerify, RecipeOption, Replicas, load_model
from sphinxkit.errors import DataError

HELP = "/image PATH asks about another picture, /reset starts anew, /exit or Ctrl-D ends."


def chat(
    checkpoint: Checkpoint,
    image: Annotated[Path | None, typer.Option("--image", "-i", help="Picture to talk about.")] = None,
    system: Annotated[str | None, typer.Option(help="Replaces the template's system text.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most this many tokens an answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus of the sampling.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    speculate: Annotated[
        int | None, typer.Option(min=1, help="Draft up to this many tokens by prompt lookup (greedy only).")
    ] = None,
    recipe: RecipeOption = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    no_verify: NoVerify = False,
    replicas: Replicas = "equal",
    llama_type: LlamaType = None,
) -> None:
    """Talk with a model about a picture, the answers written as they come.

    The picture is read once; every further question costs its own words only.

    Example:

    `sphinxkit chat models/sphinx_1k --image photo.jpg`
    """
    model = load_model(checkpoint, recipe, device, dtype, no_verify, replicas, llama_type)
    session = model.session(image, system, speculate)
    typer.echo(HELP, err=True)
    while True:
        typer.echo("you> ", nl=False, err=True)
        line = _read_line()
        if line is None or line == "/exit":
            return
        try:
            if line == "/reset":
                session.reset()
            elif line.startswith("/image"):
                session = model.session(Path(line.removeprefix("/image").strip()), system, speculate)
            elif line.startswith("/"):
                typer.echo(HELP, err=True)
            elif line:
                is_begun = False
                for piece in session.stream(line, max_new_tokens, temperature, top_p, seed):
                    shown = piece if is_begun else piece.lstrip()
                    is_begun = is_begun or bool(shown)
                    typer.echo(shown, nl=False)
                typer.echo()
        except DataError as error:  # a wrong picture or an over-long conversation need not end it
            typer.echo(f"error: {error}", err=True)


def _read_line() -> str | None:
    try:
        return input().strip()
    except EOFError:
        return None
