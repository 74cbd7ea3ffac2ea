"""``sphinxkit data``: sources of samples."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from sphinxkit.cli.command import Command
from sphinxkit.cli.options import Json
from sphinxkit.errors import DataError

app = typer.Typer(help="Sources of training samples.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    """Sources of training samples."""


@app.command(cls=Command)
def index(
    paths: Annotated[list[str], typer.Argument(help="Files, folders of shards, or globs in quotes.")],
    format_name: Annotated[
        str | None, typer.Option("--format", help="jsonl, llava, tar or parquet; default: by the ending.")
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option("--column", help="NAME=COLUMN, as in the mixture's `columns`; may be repeated."),
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: one for each core.")] = None,
    as_json: Json = False,
) -> None:
    """Index sources, so that training starts at once.

    Indexes that are up to date are kept.

    Example:
      sphinxkit data index 'laion/*.tar' mix665k.json
    """
    import sphinxkit

    named = {}
    for text in columns or ():
        name, equals, found_column = text.partition("=")
        if not name or not equals or not found_column:
            raise DataError(f"--column {text!r}: expected NAME=COLUMN, for example text=content")
        named[name] = found_column
    for path in paths:
        found = sphinxkit.index_data(path, format=format_name, columns=named, workers=workers)
        if as_json:
            typer.echo(json.dumps(found.to_dict()))
        else:
            files = f"{found.shards} {found.format} file{'' if found.shards == 1 else 's'}"
            typer.echo(f"{path}: {found.records} records in {files}, {found.seconds:.1f} s: {found.file}")
