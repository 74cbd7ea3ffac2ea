"""``sphinxkit check``: validate recipes."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from sphinxkit.cli.command import in_flags
from sphinxkit.cli.completion import complete_recipe
from sphinxkit.cli.options import Json, Trust
from sphinxkit.errors import SphinxkitError


def check(
    ctx: typer.Context,
    recipes: Annotated[
        list[str], typer.Argument(help="Recipe files or shipped names.", autocompletion=complete_recipe)
    ],
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Check recipes and report all errors at once.

    A model is also built, without memory.

    Example:
      sphinxkit check my_model.yaml sphinx_1k_13b
    """
    import sphinxkit

    results = []
    for name in recipes:
        try:
            found = sphinxkit.check(name, trust=trust)
            fields: dict[str, object] = {"recipe": name, "valid": True, "kind": found.kind}
            if found.num_parameters is not None:
                fields |= {"num_parameters": found.num_parameters, "num_image_tokens": found.num_image_tokens}
        except SphinxkitError as error:
            fields = {"recipe": name, "valid": False, "error": in_flags(str(error), ctx.command.params)}
        results.append(fields)
        if not as_json:
            typer.echo(_line(fields), err=not fields["valid"])
    if as_json:
        typer.echo(json.dumps({"recipes": results}))
    if not all(fields["valid"] for fields in results):
        raise typer.Exit(1)


def _line(fields: dict[str, object]) -> str:
    if not fields["valid"]:
        return f"error: {fields['error']}"
    size = ""
    if "num_parameters" in fields:  # only a model has a size
        size = f", {fields['num_parameters']:,} parameters, {fields['num_image_tokens']} image tokens"
    return f"{fields['recipe']}: valid, kind {fields['kind']}{size}"
