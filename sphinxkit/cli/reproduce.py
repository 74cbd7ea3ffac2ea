"""``sphinxkit reproduce``: train SPHINX-nano from scratch, and test SPHINX's claims on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from sphinxkit.cli.command import common_options


class Subject(StrEnum):
    """What can be reproduced."""

    nano = "nano"
    ablations = "ablations"


@common_options("output", "minutes", "last", "claim")
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
        float | None, typer.Option(min=0.0, help="Stop after about this long; the same command resumes.")
    ] = None,
    last: Annotated[str | None, typer.Option(help="nano: stop after this stage.")] = None,
    claim: Annotated[
        str | None, typer.Option(help="ablations: only this claim: embeddings, text, weights, sub_images or tasks.")
    ] = None,
    conversations: Annotated[
        int | None, typer.Option(min=1, help="ablations: budget of every variant. Default: 2304.")
    ] = None,
    encoders: Annotated[
        Path | None,
        typer.Option(help="ablations: checkpoint with the trained encoders; OUTPUT/../nano/encoders/model."),
    ] = None,
) -> None:
    """Train SPHINX-nano from scratch and score it.

    The same command resumes.

    Examples:
      sphinxkit reproduce nano
      sphinxkit reproduce nano --output runs/nano --minutes 60
      sphinxkit reproduce ablations --claim weights
    """
    from sphinxkit.acceleration.cpu.host_memory import keep_freed_memory

    keep_freed_memory()
    place = output or Path("runs") / subject.value
    if subject is Subject.nano:
        if (claim, encoders, conversations) != (None, None, None):
            raise typer.BadParameter("--claim, --conversations and --encoders are for ablations")
        following = _nano(place, minutes, last)
    else:
        if last is not None:
            raise typer.BadParameter("--last is for nano")
        start = encoders or place.parent / "nano" / "encoders" / "model"
        following = _ablations(place, start, claim, conversations, minutes)
    if following is not None:
        typer.echo(f"stopped; the next call resumes with {following}", err=True)


def _nano(output: Path, minutes: float | None, last: str | None) -> str | None:
    from sphinxkit.nano.stages import reproduce_nano
    from sphinxkit.nano.stages.scores import read_scores, table

    following = reproduce_nano(output, minutes=minutes, last=last, report=_say)
    if following is None and last is None:
        typer.echo(table(read_scores(output)))
    return following


def _ablations(
    output: Path, encoders: Path, claim: str | None, conversations: int | None, minutes: float | None
) -> str | None:
    from sphinxkit.nano.ablations import reproduce_ablations

    outcome = reproduce_ablations(
        output, encoders, conversations=conversations, claim=claim, minutes=minutes, report=_say
    )
    for name, verdict in outcome.verdicts.items():
        typer.echo(f"{name}: {verdict.word}")
    if outcome.page is not None:
        typer.echo(f"written: {outcome.page}", err=True)
    return outcome.next


def _say(stage: str, record: Mapping[str, Any]) -> None:
    from sphinxkit.training.callbacks import duration, progress_line

    if "losses" in record or "skipped" in record:  # a training step
        typer.echo(f"{stage}: {progress_line(record)}", err=True)
        return
    shown = {key: _short(value) for key, value in record.items() if key != "seconds_left"}
    left = f"  {duration(record['seconds_left'])} left" if "seconds_left" in record else ""
    typer.echo(f"{stage}: {json.dumps(shown)}{left}", err=True)


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
