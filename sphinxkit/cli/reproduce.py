"""``sphinxkit reproduce``: SPHINX-nano from nothing, and SPHINX's claims on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from sphinxkit.errors import RecipeError


class Subject(StrEnum):
    """What can be reproduced."""

    nano = "nano"
    ablations = "ablations"


def reproduce(
    subject: Annotated[
        Subject,
        typer.Argument(
            help="nano: SPHINX-nano, all stages and its scores. ablations: SPHINX's claims, on a smaller SPHINX-nano."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of all runs; runs/nano or runs/ablations.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.0, help="Stop after about this long; the same command goes on.")
    ] = None,
    last: Annotated[str | None, typer.Option(help="nano: stop behind this stage.")] = None,
    claim: Annotated[
        str | None, typer.Option(help="ablations: embeddings, text, weights, sub_images or tasks alone.")
    ] = None,
    conversations: Annotated[
        int | None, typer.Option(min=1, help="ablations: budget of every arm; 2304 if not said.")
    ] = None,
    encoders: Annotated[
        Path | None,
        typer.Option(help="ablations: checkpoint with the trained encoders; OUTPUT/../nano/encoders/model."),
    ] = None,
) -> None:
    """Train models from nothing, stage by stage, and score them; go on where a former call stopped.

    Examples:

    `sphinxkit reproduce nano`

    `sphinxkit reproduce nano --output runs/nano --minutes 60`

    `sphinxkit reproduce ablations --claim weights`
    """
    from sphinxkit.training.host_memory import keep_freed_memory

    keep_freed_memory()
    place = output or Path("runs") / subject.value
    if subject is Subject.nano:
        if (claim, encoders, conversations) != (None, None, None):
            raise RecipeError("reproduce nano: --claim, --conversations and --encoders are for ablations")
        following = _nano(place, minutes, last)
    else:
        if last is not None:
            raise RecipeError("reproduce ablations: --last is for nano")
        start = encoders or place.parent / "nano" / "encoders" / "model"
        following = _ablations(place, start, claim, conversations, minutes)
    if following is not None:
        typer.echo(f"stopped; the next call goes on with {following}", err=True)


def _nano(output: Path, minutes: float | None, last: str | None) -> str | None:
    from sphinxkit.nano.reproduce import reproduce as run
    from sphinxkit.nano.scores import table

    following = run(output, minutes=minutes, last=last, report=_say)
    if following is None and last is None:
        typer.echo(table(json.loads((output / "scores" / "scores.json").read_text(encoding="utf-8"))))
    return following


def _ablations(
    output: Path, encoders: Path, claim: str | None, conversations: int | None, minutes: float | None
) -> str | None:
    from sphinxkit.nano.ablation_report import CLAIMS, judge, write_page
    from sphinxkit.nano.ablations import AblationPlan, read_results, run_ablations

    plan = AblationPlan() if conversations is None else AblationPlan(conversations=conversations)
    following = run_ablations(output, encoders, plan=plan, claim=claim, minutes=minutes, report=_say)
    results = read_results(output / "results")
    if results:
        write_page(results, output / "ablations.md", output / "images")
        for each in CLAIMS:
            if claim in (None, each.name):
                typer.echo(f"{each.name}: {judge(results, each).word}")
        typer.echo(f"written: {output / 'ablations.md'}", err=True)
    return following


def _say(stage: str, record: Mapping[str, Any]) -> None:
    typer.echo(f"{stage}: {json.dumps({key: _short(value) for key, value in record.items()})}", err=True)


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
