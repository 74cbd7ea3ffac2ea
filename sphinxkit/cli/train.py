"""``sphinxkit train``: a stage of training, as its recipe says."""

from __future__ import annotations

from typing import Annotated

import typer


def train(
    recipe: Annotated[str, typer.Argument(help="Recipe of kind train: a shipped name or a file.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value, or key.below=value; the value is YAML. May be given several times."),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Refuse to resume a run that is in the output folder.")
    ] = False,
) -> None:
    """Train; resume a former run in the same output folder.

    SIGTERM and Ctrl-C save and exit with 143 and 130.

    Examples:

    `sphinxkit train finetune_13b --set init_from=runs/mixed_13b --set data_root=/data --set output=runs/finetune`

    `torchrun --nproc-per-node 8 -m sphinxkit train pretrain_13b --set tensor_parallel=2 --set output=runs/real`
    """
    import sphinxkit
    from sphinxkit.acceleration.cpu.host_memory import keep_freed_memory
    from sphinxkit.training import ProgressReport

    keep_freed_memory()
    result = sphinxkit.train(recipe, overrides=settings, callbacks=[ProgressReport()], resume=not fresh)
    if result.signal is not None:
        raise typer.Exit(128 + result.signal)
