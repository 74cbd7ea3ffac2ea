"""``sphinxkit export``: the model of a run's checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write; default: model-step-N in RUN.")
    ] = None,
    step: Annotated[int | None, typer.Option(help="Step of the checkpoint; default: the newest.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
) -> None:
    """Write the model of a training run, also while it runs.

    Example:
      sphinxkit export runs/finetune -o model_so_far
    """
    import sphinxkit

    typer.echo(sphinxkit.export(run, output, step=step, overwrite=overwrite))
