"""``sphinxkit inspect-data``: show the tokens and labels of training samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sphinxkit.cli.command import common_options
from sphinxkit.cli.options import Json

if TYPE_CHECKING:
    from rich.text import Text

    from sphinxkit.data.inspection import DataInspection, InspectedSample

# Neighbouring tokens in two shades, so that their borders can be seen (our choice)
LEARNT_STYLES = ("black on green3", "black on spring_green1")
READ_STYLES = ("grey70", "grey50")
CUT_STYLE = "strike red"
LEARNT_MARKS = ("⟦", "⟧")  # around what is learnt where there are no colours


@common_options("tokenizer", "model", "count", "root")
def inspect_data(
    source: Annotated[str, typer.Argument(help="JSON lines of samples, or a mixture recipe (name or file).")],
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.model.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Checkpoint whose tokenizer and conversation template are used; or nano.")
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=0, help="Number of samples to show.")] = 5,
    start: Annotated[int, typer.Option(min=0, help="Index of the first sample (in the file, or in the epoch).")] = 0,
    epoch: Annotated[int, typer.Option(min=0, help="Epoch of a mixture.")] = 0,
    root: Annotated[
        Path | None,
        typer.Option(help="Base folder of image paths; for a mixture, of all its paths."),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum length of a sample; default: any length.")
    ] = None,
    over_length: Annotated[
        str | None, typer.Option(help="Policy for longer samples: error, truncate or skip. Default: the mixture's.")
    ] = None,
    check_images: Annotated[
        bool, typer.Option(help="Open images; count a sample with an unreadable image as bad.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Show training samples; tokens in the loss are coloured.

    For a mixture also the contents of an epoch. Without colours (a pipe, `NO_COLOR`), tokens in the
    loss are marked by ⟦ and ⟧. An unusable sample is shown with its
    error.

    Examples:
      sphinxkit inspect-data refcoco_rec.jsonl --model models/sphinx_1k --count 3
      sphinxkit inspect-data mixture_finetune --root /data --model nano
    """
    import sphinxkit

    found = sphinxkit.inspect_data(
        source,
        tokenizer=tokenizer,
        model=model,
        count=count,
        start=start,
        epoch=epoch,
        root=root,
        max_tokens=max_tokens,
        over_length=over_length,  # type: ignore[arg-type]
        check_images=check_images,
    )
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
        return
    if found.mixture is not None:
        typer.echo(found.mixture.format_table())
    if found.mixture is None or tokenizer is not None or model is not None:
        _print(found)


def _print(found: DataInspection) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    has_colour = console.is_terminal and not console.no_color
    for entry in found.samples:
        console.print(Text(_visible(f"── {_title(entry)}"), "bold"))
        if entry.error is not None:
            console.print(Text(_visible(f"error: {entry.error}"), "bold red"))
        else:
            console.print(coloured(entry, has_colour))
    console.print(f"{len(found.samples)} samples, {found.num_bad} of them bad", markup=False)


def _title(entry: InspectedSample) -> str:
    parts = [entry.id]
    if entry.sample is not None:
        parts += [entry.sample.task or "no task", str(entry.sample.image or "no image")]
    if entry.encoded is not None:
        parts.append(f"{len(entry.encoded.token_ids)} tokens, {entry.num_learnt} learnt")
        if entry.encoded.is_truncated:
            parts.append("cut off")
    return " · ".join(parts)


def _visible(text: str) -> str:
    """Replace control characters, which a terminal would execute, by their symbols."""
    return "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in text)


def coloured(entry: InspectedSample, has_colour: bool = True) -> Text:
    """A sample's text with the tokens in the loss in colour.

    Args:
        entry: The sample, without an error.
        has_colour: False: mark them with ``LEARNT_MARKS``.
    """
    from rich.text import Text

    from sphinxkit.formatters import IGNORE_INDEX

    labels = [] if entry.encoded is None else entry.encoded.labels
    text = Text()
    was_learnt = False
    for position, piece in enumerate(entry.pieces):
        is_kept = position < len(labels)
        is_learnt = is_kept and labels[position] != IGNORE_INDEX
        if not has_colour and is_learnt != was_learnt:
            text.append(LEARNT_MARKS[0] if is_learnt else LEARNT_MARKS[1])
        was_learnt = is_learnt
        styles = LEARNT_STYLES if is_learnt else READ_STYLES
        text.append(_visible(piece), styles[position % 2] if is_kept else CUT_STYLE)
    return text.append(LEARNT_MARKS[1] if was_learnt and not has_colour else "")
