"""``sphinxkit inspect``: show the contents of a checkpoint or a recipe."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer

from sphinxkit.cli.command import common_options
from sphinxkit.cli.completion import complete_model
from sphinxkit.cli.options import Json, Overlay, TokenizerFile, Trust

if TYPE_CHECKING:
    from sphinxkit.recipe.inspection import Inspection


@common_options("keys", "as_json")
def inspect(
    name: Annotated[
        str,
        typer.Argument(
            help="Checkpoint directory, hf://org/repo, nano, or recipe (name or file).", autocompletion=complete_model
        ),
    ],
    keys: Annotated[bool, typer.Option("--keys", help="List every tensor of a checkpoint.")] = False,
    trust: Trust = False,
    overlay: Overlay = None,
    tokenizer: TokenizerFile = None,
    as_json: Json = False,
) -> None:
    """Show the parts and parameters of a checkpoint or recipe.

    For a checkpoint also its format, dtypes and tensors.

    Examples:
      sphinxkit inspect sphinx_tiny_1k
      sphinxkit inspect models/sphinx_1k --keys
    """
    import sphinxkit

    found = sphinxkit.inspect(name, trust=trust, overlay=overlay, tokenizer=tokenizer)
    found = dataclasses.replace(found, name=name)
    if as_json:
        typer.echo(json.dumps(found.to_dict(tensors=keys)))
    else:
        _print(found, keys)


def _print(found: Inspection, keys: bool) -> None:
    typer.echo(found.name)
    if found.stored is not None:
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in found.stored.dtypes.items())
        typer.echo(f"  format {found.stored.format}, {len(found.stored.files)} files, tensors: {dtypes}")
        if found.stored.tokenizer is not None:
            typer.echo(f"  tokenizer of {found.stored.vocab_size:,} ids: {found.stored.tokenizer}")
        typer.echo(f"  {len(found.stored.unused)} tensors that no part uses are carried along")
    for part, count in found.parts.items():
        typer.echo(f"  {part:<32} {count:>16,} parameters")
    typer.echo(f"  {'total':<32} {found.num_parameters:>16,} parameters")
    if found.num_active_parameters != found.num_parameters:
        typer.echo(f"  {'active per token':<32} {found.num_active_parameters:>16,} parameters")
    if found.image_size:
        typer.echo(
            f"  image {found.image_size}x{found.image_size} in {found.num_views} views, "
            f"{found.num_image_tokens} image tokens"
        )
    typer.echo(f"  context of {found.max_seq_len} tokens")
    for key, shape in found.stored.tensors.items() if keys and found.stored is not None else ():
        typer.echo(f"  {key} {shape}")
