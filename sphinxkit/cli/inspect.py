"""``sphinxkit inspect``: what a checkpoint or a recipe holds."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sphinxkit.cli.checkpoints import NANO, find_checkpoint
from sphinxkit.cli.options import Json

if TYPE_CHECKING:
    from sphinxkit.recipe import Recipe


def is_checkpoint(name: str) -> bool:
    """Whether a name means a checkpoint rather than a recipe."""
    return name == NANO or name.startswith("hf://") or Path(name).is_dir()


def recipe_of(name: str) -> Recipe:
    """The recipe called ``name``, or the one that a checkpoint tells."""
    from sphinxkit import checkpoint
    from sphinxkit.recipe import Recipe

    if not is_checkpoint(name):
        return Recipe.find(name)
    with checkpoint.open(checkpoint.resolve(find_checkpoint(name))) as opened:
        return Recipe.of_checkpoint(opened)


def inspect(
    name: Annotated[str, typer.Argument(help="Checkpoint directory, hf://org/repo, nano, or recipe (name or file).")],
    keys: Annotated[bool, typer.Option("--keys", help="List every tensor of a checkpoint.")] = False,
    as_json: Json = False,
) -> None:
    """Show parts, parameters, image tokens, and of a checkpoint its format, dtypes and tensors.

    Examples:

    `sphinxkit inspect sphinx_tiny_1k`

    `sphinxkit inspect models/sphinx_1k --keys`
    """
    from sphinxkit.recipe import build
    from sphinxkit.recipe.memory import parts_of

    recipe = recipe_of(name)
    model = build(recipe, device="meta")
    fields: dict[str, Any] = {
        "name": name,
        "parts": {part: sum(p.numel() for p in module.parameters()) for part, module in parts_of(model).items()},
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "image_size": None if model.vision is None else model.vision.image_size,
        "num_views": 0 if model.vision is None else model.vision.tiler.num_views,
        "num_image_tokens": 0 if model.vision is None else model.vision.num_tokens,
        "max_seq_len": model.llm.max_seq_len,
        "recipe": recipe.resolved(),
    }
    if is_checkpoint(name):
        fields |= _checkpoint_fields(name, keys)
    if as_json:
        typer.echo(json.dumps(fields))
    else:
        _print(fields)


def _checkpoint_fields(name: str, keys: bool) -> dict[str, Any]:
    from sphinxkit import checkpoint

    with checkpoint.open(checkpoint.resolve(find_checkpoint(name))) as opened:
        stored = Counter(str(opened.dtype(key)).removeprefix("torch.") for key in opened.keys())  # noqa: SIM118
        fields: dict[str, Any] = {
            "format": opened.format,
            "files": [str(file) for file in opened.files],
            "dtypes": dict(stored),
            "unused": list(opened.unused.keys()),
        }
        if keys:
            fields["tensors"] = {key: list(opened.shape(key)) for key in opened.keys()}  # noqa: SIM118
    return fields


def _print(fields: dict[str, Any]) -> None:
    typer.echo(fields["name"])
    if "format" in fields:
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in fields["dtypes"].items())
        typer.echo(f"  format {fields['format']}, {len(fields['files'])} files, tensors: {dtypes}")
        typer.echo(f"  {len(fields['unused'])} tensors that no part uses are carried along")
    for part, count in fields["parts"].items():
        typer.echo(f"  {part:<32} {count:>16,} parameters")
    typer.echo(f"  {'total':<32} {fields['num_parameters']:>16,} parameters")
    if fields["image_size"]:
        typer.echo(
            f"  image {fields['image_size']}x{fields['image_size']} in {fields['num_views']} views, "
            f"{fields['num_image_tokens']} image tokens"
        )
    typer.echo(f"  context of {fields['max_seq_len']} tokens")
    for key, shape in fields.get("tensors", {}).items():
        typer.echo(f"  {key} {tuple(shape)}")
