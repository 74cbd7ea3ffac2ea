"""``sphinxkit delta``: differences between a base model and one tuned from it."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sphinxkit.cli.checkpoints import find_checkpoint
from sphinxkit.cli.options import Checkpoint, Json, parse_dtype
from sphinxkit.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from sphinxkit import checkpoint
    from sphinxkit.interpolation import MixedSource

app = typer.Typer(no_args_is_help=True, help="Differences between a base model and one tuned from it.")

Output = Annotated[Path, typer.Option("--output", "-o", help="Directory to write; it appears when it is complete.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is there.")]
AllowNonfinite = Annotated[bool, typer.Option("--allow-nonfinite", help="Let NaN and Inf through.")]


@app.command()
def extract(
    base: Checkpoint,
    tuned: Checkpoint,
    output: Output,
    dtype: Annotated[str | None, typer.Option(help="Of the differences; default: the tuned model's.")] = None,
    num_shards: Annotated[int | None, typer.Option("--shards", min=1, help="Default: the tuned model's, or 1.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Add it back and report how far that is from TUNED.")
    ] = False,
    overwrite: Overwrite = False,
    allow_nonfinite: AllowNonfinite = False,
    as_json: Json = False,
) -> None:
    """Write TUNED - BASE as `consolidated.NN-of-MM.model-diff.pth`, as the public implementation does.

    Tensors that only TUNED has are stored whole. With 16 bits the difference is rounded; `--dtype float32` keeps it.

    Example:

    `sphinxkit delta extract llama2 sphinx -o sphinx_delta --verify`
    """
    from sphinxkit import checkpoint as checkpoints
    from sphinxkit.cli.mixing import joined, open_all
    from sphinxkit.interpolation.delta import apply_delta, extract_delta
    from sphinxkit.interpolation.diff import compare

    with ExitStack() as stack:
        first, second = open_all([find_checkpoint(base), find_checkpoint(tuned)], stack)
        wanted: torch.dtype | Literal["first"] = parse_dtype(dtype) if dtype else "first"
        delta = extract_delta(joined(first), joined(second), dtype=wanted, allow_nonfinite=allow_nonfinite)
        shards = num_shards or second.metadata.get("num_shards") or 1
        _write(output, delta, first, second, second, "sphinx", shards, overwrite, "extracting", delta_files=True)
        fields: dict[str, Any] = {"output": str(output), "tensors": len(delta.outcomes), "shards": shards}
        if verify:
            written = stack.enter_context(checkpoints.open(output, delta=True))
            restored = apply_delta(joined(first), joined(written), allow_nonfinite=allow_nonfinite)
            report = compare(joined(second), restored)
            fields["verified"] = {
                "identical_tensors": report.num_identical,
                "max_abs": report.total.max_abs,
                "relative_l2": report.total.relative_l2,
            }
    if as_json:
        typer.echo(json.dumps(fields))
        return
    typer.echo(f"wrote {output}", err=True)
    if verify:
        typer.echo(
            f"added back: {report.num_identical} of {len(report.tensors)} tensors are equal, the largest difference is "
            f"{report.total.max_abs:.3g}, relative L2 {report.total.relative_l2:.3g}"
        )


@app.command()
def apply(
    base: Checkpoint,
    delta: Annotated[str, typer.Argument(help="Directory with consolidated.NN-of-MM.model-diff.pth.")],
    output: Output,
    to: Annotated[str, typer.Option("--to", help="sphinxkit, sphinx (as released), meta or hf.")] = "sphinx",
    dtype: Annotated[str | None, typer.Option(help="Of the result; default: the base's, tensor by tensor.")] = None,
    num_shards: Annotated[
        int | None, typer.Option("--shards", min=1, help="Default: the delta's (sphinx, meta).")
    ] = None,
    overwrite: Overwrite = False,
    allow_nonfinite: AllowNonfinite = False,
    as_json: Json = False,
) -> None:
    """Write BASE + DELTA as a checkpoint.

    Tensors that only one of them has are taken as they are. Base and delta may be cut into different numbers of shards.

    Example:

    `sphinxkit delta apply llama2 sphinx_delta -o sphinx`
    """
    from sphinxkit import checkpoint as checkpoints
    from sphinxkit.cli.mixing import joined, open_all
    from sphinxkit.interpolation.delta import apply_delta

    with ExitStack() as stack:
        (first,) = open_all([find_checkpoint(base)], stack)
        second = stack.enter_context(checkpoints.open(checkpoints.resolve(delta), delta=True))
        wanted: torch.dtype | Literal["first"] = parse_dtype(dtype) if dtype else "first"
        result = apply_delta(joined(first), joined(second), dtype=wanted, allow_nonfinite=allow_nonfinite)
        shards = None if to not in ("sphinx", "meta") else num_shards or second.metadata.get("num_shards") or 1
        described = second if second.has_recipe else first
        _write(output, result, first, second, described, to, shards, overwrite, "applying", delta_files=False)
    if as_json:
        typer.echo(json.dumps({"output": str(output), "tensors": len(result.outcomes)}))
    else:
        typer.echo(f"wrote {output}", err=True)


def _write(
    output: Path,
    source: MixedSource,
    first: checkpoint.Checkpoint,
    second: checkpoint.Checkpoint,
    described: checkpoint.Checkpoint,
    layout: str,
    shards: int | None,
    overwrite: bool,
    title: str,
    *,
    delta_files: bool,
) -> None:
    """Write a delta or what it makes, with the recipe of ``described`` and whichever tokenizer there is."""
    from sphinxkit import checkpoint as checkpoints
    from sphinxkit.cli.mixing import no_new_parents
    from sphinxkit.cli.progress import byte_progress
    from sphinxkit.interpolation.sources import SelectedSource
    from sphinxkit.recipe import Recipe

    for opened in (first, second):
        if output.exists() and opened.path.resolve() == output.resolve():
            raise CheckpointError(f"{output}: is one of the inputs; write the result somewhere else")
    if layout not in checkpoints.FORMATS:
        raise CheckpointError(f"--to {layout!r}: expected one of {', '.join(checkpoints.FORMATS)}")
    names = {key for opened in (first, second) for key in opened.unused.keys()}  # noqa: SIM118
    unused = SelectedSource(source, lambda key: key in names)
    total = sum(math.prod(plan.shape) * plan.dtype.itemsize for plan in source.outcomes.values())
    with no_new_parents(output), byte_progress(f"{title} {output}", total) as progress:
        checkpoints.save(
            output,
            SelectedSource(source, lambda key: key not in names),
            format=layout,
            num_shards=shards,
            recipe=Recipe.of_checkpoint(described).resolved() if described.has_recipe else None,
            tokenizer=second.tokenizer_path or first.tokenizer_path,
            unused=unused if unused.keys() else None,
            overwrite=overwrite,
            progress=progress,
            delta=delta_files,
        )
