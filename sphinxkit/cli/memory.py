"""``sphinxkit memory``: will it fit?"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from sphinxkit.cli.options import Json, parse_dtype

GIB = 2**30


def memory(
    recipe: Annotated[str, typer.Argument(help="Recipe (name or file) or checkpoint directory.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Rows answered together.")] = 1,
    text_tokens: Annotated[int, typer.Option(min=1, help="Prompt and answer of a row, without the image.")] = 512,
    images: Annotated[int | None, typer.Option(help="Images in the batch; default one for each row.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="May be repeated. Default: float32 and bfloat16.")] = None,
    as_json: Json = False,
) -> None:
    """Predict the memory of weights, KV cache and activations, without loading anything.

    Examples:

    `sphinxkit memory sphinx_1k_13b`

    `sphinxkit memory models/sphinx_1k --batch-size 8 --text-tokens 1024 --dtype bfloat16 --json`
    """
    from sphinxkit.cli.inspect import recipe_of
    from sphinxkit.recipe.memory import estimate_memory

    found = recipe_of(recipe)
    results: dict[str, Any] = {}
    for name in dtype or ["float32", "bfloat16"]:
        estimate = estimate_memory(
            found, dtype=parse_dtype(name), batch_size=batch_size, text_tokens=text_tokens, images=images
        )
        results[name] = {
            "weights": estimate.weights,
            "kv_cache": estimate.kv_cache,
            "activations": estimate.activations,
            "total": estimate.total,
        }
    if as_json:
        typer.echo(json.dumps({"recipe": recipe, "unit": "bytes", "dtypes": results}))
        return
    for name, sizes in results.items():
        typer.echo(f"{name}, {batch_size} rows, GiB")
        for part, size in sizes["weights"].items():
            typer.echo(f"  weights  {part:<28} {size / GIB:9.3f}")
        for purpose in ("kv_cache", "activations", "total"):
            typer.echo(f"  {purpose:<37} {sizes[purpose] / GIB:9.3f}")
