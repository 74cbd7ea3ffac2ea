"""``sphinxkit reproduce``: SPHINX-nano from nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class Subject(StrEnum):
    """What can be reproduced."""

    nano = "nano"


def reproduce(
    subject: Annotated[Subject, typer.Argument(help="nano: SPHINX-nano, all stages and its scores.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of all runs.")] = Path("runs/nano"),
    minutes: Annotated[
        float | None, typer.Option(min=0.0, help="Stop after about this long; the same command goes on.")
    ] = None,
    last: Annotated[str | None, typer.Option(help="Stop behind this stage.")] = None,
) -> None:
    """Train a model from nothing, stage by stage, and score it; go on where a former call stopped.

    Examples:

    `sphinxkit reproduce nano`

    `sphinxkit reproduce nano --output runs/nano --minutes 60`
    """
    from sphinxkit.nano.reproduce import reproduce as run
    from sphinxkit.nano.scores import table

    def say(stage: str, record: Mapping[str, Any]) -> None:
        typer.echo(f"{stage}: {json.dumps({key: _short(value) for key, value in record.items()})}", err=True)

    following = run(output, minutes=minutes, last=last, report=say)
    if following is not None:
        typer.echo(f"stopped; the next call goes on with {following}", err=True)
    elif last is None:
        typer.echo(table(json.loads((output / "scores" / "scores.json").read_text(encoding="utf-8"))))


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
