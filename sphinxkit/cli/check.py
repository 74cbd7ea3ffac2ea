"""``sphinxkit check``: is a recipe right?"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from sphinxkit.cli.options import Json
from sphinxkit.errors import SphinxkitError


def check(
    recipes: Annotated[list[str], typer.Argument(help="Recipe files or shipped names.")],
    as_json: Json = False,
) -> None:
    """Check recipes: every fault at once; a model is also put together without memory.

    Example:

    `sphinxkit check my_model.yaml sphinx_1k_13b`
    """
    from sphinxkit.recipe import Recipe, build

    results = []
    for name in recipes:
        try:
            recipe = Recipe.find(name)
            fields = {"recipe": name, "valid": True, "kind": recipe.kind}
            if recipe.kind == "model":
                model = build(recipe, device="meta")
                fields["num_parameters"] = sum(parameter.numel() for parameter in model.parameters())
                fields["num_image_tokens"] = 0 if model.vision is None else model.vision.num_tokens
        except SphinxkitError as error:
            fields = {"recipe": name, "valid": False, "error": str(error)}
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
