"""``sphinxkit inspect-data``: what an epoch holds, and samples with what is learnt of them in colour."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sphinxkit.data.mixture import Mixture
    from sphinxkit.tokenizer import Tokenizer

LEARNT_STYLE = "bold green"


def inspect_data(
    source: Annotated[Path, typer.Argument(help="Mixture recipe (.yaml) or conversation JSON lines.")],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.model that the labels are made with.")],
    count: Annotated[int, typer.Option("--count", "-n", min=0, help="Samples to print.")] = 5,
    start: Annotated[int, typer.Option(min=0, help="Number of the first of them in the epoch.")] = 0,
    epoch: Annotated[int, typer.Option(min=0, help="Number of the epoch.")] = 0,
    folder: Annotated[Path, typer.Option(help="Folder that a mixture's paths are relative to.")] = Path(),
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Longest sample, for the mixture's policy.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print a mixture's table and its samples in their order, the learnt tokens coloured."""
    import json
    from dataclasses import asdict

    from rich.console import Console
    from rich.text import Text

    from sphinxkit.tokenizer import Tokenizer

    mixture, reader = _open(source, folder), Tokenizer(tokenizer)
    refs = [ref for ref, _ in zip(mixture.order(epoch, start), range(count), strict=False)]
    samples = [_describe(mixture, reader, ref, max_tokens) for ref in refs]
    if as_json:
        typer.echo(json.dumps({"table": [asdict(row) for row in mixture.table()], "samples": samples}))
        return
    console = Console(soft_wrap=True, highlight=False)
    console.print(mixture.format_table(), markup=False)
    for sample in samples:
        console.print(
            f"\n{sample['id']}  {sample['task']}  {sample['image'] or 'no image'}", markup=False, style="bold"
        )
        if "error" in sample:
            console.print(f"left out: {sample['error']}", markup=False, style="red")
            continue
        text = Text()
        for piece, is_learnt in sample["pieces"]:
            text.append(piece, LEARNT_STYLE if is_learnt else "")
        console.print(text)
        console.print(f"{sample['num_tokens']} tokens, {sample['num_learnt']} learnt", style="dim")


def _open(source: Path, folder: Path) -> Mixture:
    from sphinxkit.data.mixture import Mixture, MixtureSource
    from sphinxkit.data.samples import JsonLinesFile

    if source.suffix in (".yaml", ".yml"):
        from sphinxkit.errors import DataError
        from sphinxkit.recipe import Recipe

        recipe = Recipe.find(source)
        if recipe.kind != "mixture":
            raise DataError(f"{source}: expected a recipe of kind mixture, got {recipe.kind}")
        options = {key: value for key, value in recipe.resolved().items() if key != "kind"}
        return Mixture(**{"folder": str(folder), **options})
    has_image = "image" in JsonLinesFile(source).read(0)
    return Mixture([MixtureSource(str(source), type="image-text" if has_image else "text")])


def _describe(mixture: Mixture, tokenizer: Tokenizer, ref: Any, max_tokens: int | None) -> dict[str, Any]:
    """One sample as JSON holds it: ``pieces`` are runs of text and whether they are learnt."""
    from sphinxkit.data.conversations import encode_sample
    from sphinxkit.errors import DataError
    from sphinxkit.formatters.conversation import IGNORE_INDEX, sphinx_v1

    found: dict[str, Any] = {"id": mixture.sample_id(ref), "task": "", "image": None}
    try:
        sample = mixture.read(ref)
        found.update(task=sample.task, image=None if sample.image is None else str(sample.image))
        encoded = encode_sample(sample, sphinx_v1(), tokenizer, max_tokens, mixture.over_length)
    except DataError as error:
        return {**found, "error": str(error)}
    runs: list[tuple[list[int], bool]] = []
    for token, label in zip(encoded.token_ids, encoded.labels, strict=True):
        is_learnt = label != IGNORE_INDEX
        if not runs or runs[-1][1] != is_learnt:
            runs.append(([], is_learnt))
        runs[-1][0].append(token)
    # decoded up to each boundary, as a tokenizer drops the space in front of what stands alone
    pieces: list[list[Any]] = []
    so_far: list[int] = []
    before = ""
    for ids, is_learnt in runs:
        so_far = [*so_far, *ids]
        text = tokenizer.decode(so_far)
        pieces.append([text[len(before) :], is_learnt])
        before = text
    return {
        **found,
        "pieces": pieces,
        "num_tokens": len(encoded.token_ids),
        "num_learnt": sum(label != IGNORE_INDEX for label in encoded.labels),
        "is_truncated": encoded.is_truncated,
    }
