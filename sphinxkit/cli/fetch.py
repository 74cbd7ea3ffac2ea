"""``sphinxkit fetch``: download what a recipe needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sphinxkit.cli.completion import complete_recipe

if TYPE_CHECKING:
    from sphinxkit.recipe.fetch import NeededFiles


def fetch(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A shipped recipe's name or a file, of any kind; or hf://org/repo.", autocompletion=complete_recipe
        ),
    ],
    to: Annotated[
        Path | None,
        typer.Option("--to", help="Separate cache folder, to be used with HF_HUB_CACHE; default: the usual cache."),
    ] = None,
) -> None:
    """Download the files that a recipe names on Hugging Face.

    Sizes and licences are printed first. Cached files are reused, and an interrupted download is resumed. With
    HF_HUB_OFFLINE=1 the missing files are listed.

    Example:
      sphinxkit fetch pretrain_13b
    """
    import sphinxkit

    needed = sphinxkit.fetch(recipe, to=to, announce=_announce)
    if not needed:
        typer.echo("nothing to fetch: the recipe names nothing on the hub")
    elif to is not None:
        typer.echo(f"done; use it with HF_HUB_CACHE={to}")


def _announce(needed: Sequence[NeededFiles]) -> None:
    for item in needed:
        license = item.license or "licence not stated"
        gate = f", accept it at https://huggingface.co/{item.source.repo}" if item.is_gated else ""
        absent = sum(file.size or 0 for file in item.missing)
        size = "size not known" if item.problem else f"{item.num_bytes / 1e9:.2f} GB, {absent / 1e9:.2f} GB to download"
        typer.echo(f"{item.place}: {item.source.text}: {len(item.files)} files, {size} ({license}{gate})")
