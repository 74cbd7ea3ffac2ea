"""``sphinxkit memory``: predict memory use."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sphinxkit.cli.command import common_options
from sphinxkit.cli.completion import complete_model
from sphinxkit.cli.options import Json, Trust, parse_dtype

if TYPE_CHECKING:
    from sphinxkit.recipe import Recipe

GIB = 2**30


@common_options("batch_size", "dtype", "gpu", "processes", "as_json")
def memory(
    recipe: Annotated[
        str,
        typer.Argument(
            help="Recipe (name or file) or checkpoint directory, hf://org/repo or nano.", autocompletion=complete_model
        ),
    ],
    batch_size: Annotated[int, typer.Option(min=1, help="Batch size.")] = 1,
    text_tokens: Annotated[int, typer.Option(min=1, help="Prompt and answer tokens per row, without the image.")] = 512,
    images: Annotated[int | None, typer.Option(help="Images in the batch; default: one per row.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="May be repeated. Default: float32 and bfloat16.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Say whether it fits: h100, rtx4090, a100-40gb and so on.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="For a train recipe: number of processes.")] = 1,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="For a train recipe: override a key, as in `sphinxkit train`.")
    ] = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Predict memory use without loading anything.

    Counts weights, KV cache and activations. For a train recipe: the memory of each training process.

    Examples:
      sphinxkit memory sphinx_1k_13b --batch-size 8 --gpu h100
      sphinxkit memory models/sphinx_1k --text-tokens 1024 --dtype bfloat16
      sphinxkit memory finetune_7b --processes 2 --set pack_tokens=4096
    """
    import sphinxkit
    from sphinxkit.recipe.inspection import recipe_of
    from sphinxkit.recipe.memory import gpu_bytes
    from sphinxkit.registry import no_imports

    with nullcontext() if trust else no_imports():
        found = recipe_of(recipe, trust)
        if found.kind == "train":
            _say_training(found, settings or [], processes, text_tokens, as_json)
            return
    if gpu is not None:
        gpu_bytes(gpu)  # a name that is not known is an error before any work
    results: dict[str, Any] = {}
    for name in dtype or ["float32", "bfloat16"]:
        estimate = sphinxkit.memory(
            found, dtype=parse_dtype(name), batch_size=batch_size, text_tokens=text_tokens, images=images, trust=trust
        )
        results[name] = {
            "weights": estimate.weights,
            "kv_cache": estimate.kv_cache,
            "activations": estimate.activations,
            "total": estimate.total,
            **({"experts": estimate.experts, "active": estimate.active} if estimate.experts else {}),
        }
        if gpu is not None:
            results[name]["left"] = estimate.left_on(gpu)
    if as_json:
        typer.echo(json.dumps({"recipe": recipe, "unit": "bytes", "dtypes": results}))
        return
    for name, sizes in results.items():
        typer.echo(f"{name}, {batch_size} rows, GiB")
        for part, size in sizes["weights"].items():
            typer.echo(f"  weights  {part:<28} {size / GIB:9.3f}")
        for purpose, what in (("experts", "of llm: experts"), ("active", "of llm: active per token")):
            if purpose in sizes:
                typer.echo(f"           {what:<28} {sizes[purpose] / GIB:9.3f}")
        for purpose in ("kv_cache", "activations", "total"):
            typer.echo(f"  {purpose:<37} {sizes[purpose] / GIB:9.3f}")
        if gpu is not None:
            said = f"fits on {gpu}, left" if sizes["left"] >= 0 else f"does not fit on {gpu}, short of"
            typer.echo(f"  {said:<37} {abs(sizes['left']) / GIB:9.3f}")


def _say_training(recipe: Recipe, settings: Sequence[str], processes: int, text_tokens: int, as_json: bool) -> None:
    from sphinxkit.training.memory import estimate_training
    from sphinxkit.training.overrides import read_plan

    plan, folder = read_plan(recipe, settings)
    estimate = estimate_training(plan, processes=processes, text_tokens=text_tokens, folder=folder)
    sizes = dataclasses.asdict(estimate) | {"total": estimate.total}
    tokens, images, experts = (sizes.pop(key) for key in ("row_tokens", "row_images", "experts"))
    if as_json:
        row = {"tokens": tokens, "images": images}
        typer.echo(
            json.dumps(
                {"recipe": str(recipe.source), "unit": "bytes", "processes": processes, "row": row}
                | sizes
                | ({"experts": experts} if experts else {})
            )
        )
        return
    typer.echo(f"each of {processes} processes, {plan.dtype}, rows of {tokens} tokens with {images} images, GiB")
    for purpose, size in sizes.items():
        typer.echo(f"  {purpose:<37} {size / GIB:9.3f}")
    if experts:
        typer.echo(f"  {'of it the experts, before computing':<37} {experts / GIB:9.3f}")
