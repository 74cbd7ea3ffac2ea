"""``sphinxkit train``: run a training stage from its recipe."""

from __future__ import annotations

from typing import Annotated

import typer

from sphinxkit.cli.completion import complete_recipe


def train(
    recipe: Annotated[
        str, typer.Argument(help="Train recipe: a shipped name or a file.", autocompletion=complete_recipe)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Override a recipe key: key=value or key.subkey=value, with a YAML value; may be repeated."
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Raise an error instead of resuming a run in the output folder.")
    ] = False,
) -> None:
    """Train from a recipe; the same command resumes a stopped run.

    A run in the recipe's output folder is resumed. SIGTERM and Ctrl-C save the state and exit with 143 and 130.

    Examples:
      sphinxkit train finetune_7b --set init_from=mixed --set data_root=/data
      torchrun --nproc-per-node 8 -m sphinxkit train pretrain_13b --set lr=1e-5
    """
    import sphinxkit
    from sphinxkit.acceleration.cpu.host_memory import keep_freed_memory
    from sphinxkit.training import ProgressReport

    keep_freed_memory()
    result = sphinxkit.train(recipe, overrides=overrides, callbacks=[ProgressReport()], resume=not fresh)
    if result.signal is not None:
        raise typer.Exit(128 + result.signal)
