"""``sphinxkit chat``: a conversation in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sphinxkit.cli.command import common_options
from sphinxkit.cli.options import AnswerOptions, Checkpoint, LoadOptions, option_groups
from sphinxkit.errors import DataError
from sphinxkit.hub import NANO, is_nano

if TYPE_CHECKING:
    from sphinxkit.sphinx_model.session import ChatSession

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
    from sphinxkit.nano import unfamiliar
    from sphinxkit.sphinx_model.answers import uncertainty

    def look(picture: Path | None) -> ChatSession:
        opened = model.session(picture, system, answering.num_draft_tokens)
        if picture is not None and is_nano(checkpoint):
            _note(unfamiliar(model, picture))
        return opened

    session = look(image)
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
                session = look(Path(line.removeprefix("/image").strip()))
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
                _note(uncertainty(model.conversation, session.confidence))
        except DataError as error:  # a wrong picture or an over-long conversation need not end it
            typer.echo(f"error: {error}", err=True)


def _note(text: str | None) -> None:
    if text:
        typer.echo(f"note: {text}", err=True)


def _read_line() -> str | None:
    try:
        return input().strip()
    except EOFError:
        return None
