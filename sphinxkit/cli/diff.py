"""``sphinxkit diff``: where two models differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sphinxkit.cli.command import common_options
from sphinxkit.cli.options import Checkpoint, Json, Rename

if TYPE_CHECKING:
    from sphinxkit.interpolation.diff import DiffReport, Distance

_PIPE_WIDTH = 200


@common_options("tensors", "plot", "as_json")
def diff(
    first: Checkpoint,
    second: Checkpoint,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor, not only layers and modules.")] = False,
    plot: Annotated[Path | None, typer.Option(help="PNG with a heat map of the layers.")] = None,
    rename: Rename = None,
    as_json: Json = False,
) -> None:
    """Measure how far two models are apart, layer by layer.

    Shows L2, cosine and the largest difference.

    Examples:
      sphinxkit diff base tuned --plot where.png
      sphinxkit diff base tuned --json > distances.json
    """
    import sphinxkit
    from sphinxkit.interpolation.rename import parse_rename

    report = sphinxkit.diff(first, second, plot=plot, rename=parse_rename(rename) if rename else None)
    if as_json:
        typer.echo(json.dumps({"first": first, "second": second, **report.to_dict()}))
        return
    _print(report, report.tensors if tensors else report.layers)


def _print(report: DiffReport, rows: tuple[Distance, ...]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(Column("name", no_wrap=True), "elements", "L2", "relative L2", "cosine", "max")
    for row in (*rows, report.total):
        table.add_row(
            row.name,
            f"{row.numel:,}",
            f"{row.l2:.4g}",
            f"{row.relative_l2:.3e}",
            f"{row.cosine:.6f}",
            f"{row.max_abs:.3e}",
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPE_WIDTH)  # names stay whole in a file
    console.print(table)
    console.print(f"{report.num_identical} of {len(report.tensors)} tensors are equal")
    for label, names in (("first", report.only_first), ("second", report.only_second)):
        if names:
            shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
            console.print(f"only in the {label}: {shown}")
    for name, (mine, theirs) in report.shapes.items():
        console.print(f"shapes differ: {name}: {list(mine)} and {list(theirs)}")
