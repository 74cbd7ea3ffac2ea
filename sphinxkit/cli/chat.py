"""``sphinxkit chat``: a conversation in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sphinxkit.cli.command import common_options
from sphinxkit.cli.options import AnswerOptions, Checkpoint, LoadOptions, option_groups
from sphinxkit.errors import DataError
from sphinxkit.hub import NANO

HELP = "/image PATH asks about another picture, /reset starts anew, /exit or Ctrl-D ends."


@common_options("image", "system", "max_new_tokens", "device")
@option_groups
def chat(
    *,
    checkpoint: Checkpoint = NANO,
    image: Annotated[Path | None, typer.Option("--image", "-i", help="Image to talk about.")] = None,
    system: Annotated[str | None, typer.Option(help="Replaces the template's system text.")] = None,
    answering: AnswerOptions,
    loading: LoadOptions,
) -> None:
    """Chat with a model about an image; answers are streamed.

    The image is encoded once, and the KV cache is kept between turns. Without a CHECKPOINT, the built-in SPHINX-nano is
    used.

    Examples:
      sphinxkit chat --image scene.png
      sphinxkit chat models/sphinx_1k --image photo.jpg
    """
    model = loading.load(checkpoint)
    session = model.session(image, system, answering.num_draft_tokens)
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
                session = model.session(Path(line.removeprefix("/image").strip()), system, answering.num_draft_tokens)
            elif line.startswith("/"):
                typer.echo(HELP, err=True)
            elif line:
                is_begun = False
                for piece in session.stream(
                    line, answering.max_new_tokens, answering.temperature, answering.top_p, answering.seed
                ):
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
