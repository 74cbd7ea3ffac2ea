"""``sphinxkit score``: score a file of predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sphinxkit.cli.command import common_options
from sphinxkit.cli.completion import complete_names

if TYPE_CHECKING:
    from sphinxkit.evaluation import Report


def _rows(scores: dict[str, Any], lenient: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    rows: list[tuple[str, Any, Any]] = []
    for name, value in scores.items():
        other = lenient.get(name)
        if isinstance(value, dict):
            inner = other if isinstance(other, dict) else {}
            rows += [(f"{name}.{label}", number, inner.get(label)) for label, number in value.items()]
        else:
            rows.append((name, value, other))
    return rows


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


@common_options("annotations", "predictions", "box_format", "as_json")
def score(
    benchmark: Annotated[
        str,
        typer.Argument(
            help="A benchmark (`sphinxkit list benchmarks`) or a task.",
            autocompletion=complete_names("benchmarks", "tasks"),
        ),
    ],
    annotations: Annotated[Path, typer.Option(help="Annotations with gt_answers, or the benchmark's own file.")],
    predictions: Annotated[
        Path,
        typer.Option(help="Answers: texts in order, {question_id, answer}, or the benchmark's own file."),
    ],
    split: Annotated[
        str | None, typer.Option(help="Split to take from a file that holds several; default: the benchmark's.")
    ] = None,
    box_format: Annotated[
        str | None,
        typer.Option(
            help="Another model's boxes: pixels, xyxy_1000, yxyx_1000, qwen_vl, internvl, qwen2_vl, ...; never guessed."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Score a file of predictions by the benchmark's own rules.

    The exit code is 1 where neither parser could read any answer, or questions failed when the answers were made.

    Examples:
      sphinxkit score refcocog_val --annotations val.json --predictions my.jsonl
      sphinxkit score docvqa_val --annotations val_v1.0.json --predictions my.json
    """
    import sphinxkit

    print_report(sphinxkit.score(benchmark, annotations, predictions, split=split, box_format=box_format), as_json)


def print_report(report: Report, as_json: bool) -> None:
    """Print a report as one JSON object or as a table; exit code 1 where its scores are unreliable."""
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
    else:
        _print_table(report)
    if report.is_doubtful:
        raise typer.Exit(1)


def _print_table(report: Report) -> None:
    typer.echo(f"{report.benchmark}: {report.count} questions, metric {report.metric}")
    rows = [(name, _number(value), _number(lenient)) for name, value, lenient in _rows(report.scores, report.lenient)]
    width = max(len(name) for name, _, _ in rows)
    typer.echo(f"  {'':{width}}  {'strict':>10}  {'lenient':>10}")
    for name, value, lenient in rows:
        typer.echo(f"  {name:{width}}  {value:>10}  {lenient:>10}".rstrip())
    typer.echo(f"  unparsable answers: {report.unparsable}")
    for note in report.notes:
        typer.echo(f"  note: {note}")
