"""``sphinxkit demo``: web page for questions about pictures, with answers drawn on them."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from sphinxkit.cli.command import common_options
from sphinxkit.cli.options import AnswerOptions, Checkpoint, LoadOptions, option_groups
from sphinxkit.hub import NANO


@common_options("host", "port", "device")
@option_groups
def demo(
    *,
    checkpoint: Checkpoint = NANO,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is open to the network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 is a free one.")] = 7860,
    answering: AnswerOptions,
    loading: LoadOptions,
) -> None:
    """Serve a web page for questions about images.

    Boxes and key points of the answers are drawn. Without a CHECKPOINT, the built-in SPHINX-nano is used. Needs
    `pip install "sphinxkit[demo]"`. The server runs on
    this machine and sends no data elsewhere.

    Example:
      sphinxkit demo --port 8000
    """
    from sphinxkit import nano
    from sphinxkit.generation import Sampling
    from sphinxkit.integrations.demo import import_gradio, serving
    from sphinxkit.nano.examples import ABOUT, examples

    import_gradio()  # loading the model takes longer
    how = Sampling(answering.max_new_tokens, answering.temperature, answering.top_p, seed=answering.seed)
    model = loading.load(checkpoint)
    told: dict[str, Any] = {"title": Path(checkpoint).name}
    if checkpoint == NANO:
        told = {"title": nano.NAME, "about": ABOUT, "examples": examples()}
        told["picture_note"] = partial(nano.unfamiliar, model)
    with serving(
        model,
        **told,
        sampling=how,
        num_draft_tokens=answering.num_draft_tokens,
        host=host,
        port=port,
    ) as url:
        typer.echo(f"{url} (Ctrl-C ends)")
        threading.Event().wait()
