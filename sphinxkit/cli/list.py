"""``sphinxkit list``: the names that commands and recipes take."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from sphinxkit.cli.completion import complete_kind
from sphinxkit.cli.options import Json


def list_names(
    kind: Annotated[
        str,
        typer.Argument(
            help="recipes, tasks, encoders, formats (of checkpoints), data-formats, methods (of mixing), benchmarks, "
            "mixers or tilers.",
            autocompletion=complete_kind,
        ),
    ],
    as_json: Json = False,
) -> None:
    """List the names of a kind, one a line, plug-ins' included.

    Examples:
      sphinxkit list recipes
      sphinxkit list tasks --json
    """
    import sphinxkit

    names = sphinxkit.list_names(kind)
    typer.echo(json.dumps({kind: names}) if as_json else "\n".join(names))
