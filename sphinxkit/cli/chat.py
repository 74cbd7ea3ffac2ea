"""``sphinxkit chat``: a conversation in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sphinxkit.cli.options import Checkpoint, Device, Dtype, RecipeOption, load_model
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
    recipe: RecipeOption = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Talk with a model about a picture, the answers written as they come.

    Example:

    `sphinxkit chat models/sphinx_1k --image photo.jpg`
    """
    model = load_model(checkpoint, recipe, device, dtype)
    opening = [] if system is None else [{"role": "system", "content": system}]
    messages = list(opening)
    typer.echo(HELP, err=True)
    while True:
        typer.echo("you> ", nl=False, err=True)
        line = _read_line()
        if line is None or line == "/exit":
            return
        if line == "/reset":
            messages = list(opening)
        elif line.startswith("/image"):
            image, messages = Path(line.removeprefix("/image").strip()), list(opening)
        elif line.startswith("/"):
            typer.echo(HELP, err=True)
        elif line:
            messages.append({"role": "user", "content": line})
            prompt, stop = model.chat_prompt(messages)
            try:
                answer = ""
                for piece in model.stream(prompt, image, max_new_tokens, temperature, top_p, stop, seed):
                    shown = piece if answer else piece.lstrip()
                    answer += shown
                    typer.echo(shown, nl=False)
                typer.echo()
            except DataError as error:  # a wrong picture or an over-long conversation need not end it
                typer.echo(f"error: {error}", err=True)
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": answer.strip() or "(no answer)"})


def _read_line() -> str | None:
    try:
        return input().strip()
    except EOFError:
        return None
