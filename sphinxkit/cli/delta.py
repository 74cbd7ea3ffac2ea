"""``sphinxkit delta``: differences between a base model and one tuned from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sphinxkit.cli.command import Command, common_options
from sphinxkit.cli.options import Checkpoint, Json, parse_dtype

app = typer.Typer(no_args_is_help=True, help="Differences between a base model and one tuned from it.")

Output = Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing checkpoint.")]
AllowNonfinite = Annotated[bool, typer.Option("--allow-nonfinite", help="Allow NaN and Inf.")]


@app.command(cls=Command)
@common_options("output", "format", "dtype", "verify", "overwrite")
def extract(
    base: Checkpoint,
    tuned: Checkpoint,
    output: Output,
    format: Annotated[
        str | None,
        typer.Option("--to", help="sphinx, or safetensors for folders of any model; default: what BASE needs."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Dtype of the differences; default: the tuned model's.")] = None,
    num_shards: Annotated[
        int | None, typer.Option("--shards", min=1, help="Number of shards; default: the tuned model's, or 1.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check: add the delta to BASE and report the distance to TUNED.")
    ] = False,
    overwrite: Overwrite = False,
    allow_nonfinite: AllowNonfinite = False,
    as_json: Json = False,
) -> None:
    """Write TUNED - BASE, as the public implementation does.

    The files are `consolidated.NN-of-MM.model-diff.pth`.

    Folders of a model that this library does not know give `delta.safetensors`, by their files' own names.

    Tensors that only TUNED has are stored whole. In 16 bit the difference is rounded; `--dtype float32` is more exact.

    Example:
      sphinxkit delta extract llama2 sphinx -o sphinx_delta --verify
    """
    import sphinxkit
    from sphinxkit.cli.progress import byte_progress

    with byte_progress(f"extracting {output}") as progress:
        result = sphinxkit.extract_delta(
            base,
            tuned,
            output,
            format=format,
            dtype=parse_dtype(dtype) if dtype else None,
            num_shards=num_shards,
            verify=verify,
            overwrite=overwrite,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
        )
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
        return
    typer.echo(f"wrote {output}", err=True)
    report = result.verified
    if report is not None:
        typer.echo(
            f"added back: {report.num_identical} of {len(report.tensors)} tensors are equal, the largest difference is "
            f"{report.total.max_abs:.3g}, relative L2 {report.total.relative_l2:.3g}"
        )


@app.command(cls=Command)
@common_options("output", "format", "dtype", "verify", "overwrite")
def apply(
    base: Checkpoint,
    delta: Annotated[
        str, typer.Argument(help="Directory with consolidated.NN-of-MM.model-diff.pth or delta.safetensors.")
    ],
    output: Output,
    format: Annotated[
        str | None,
        typer.Option(
            "--to", help="sphinxkit, sphinx (as released), meta, hf, safetensors; default: sphinx or as BASE."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Dtype of the result; default: the base's, tensor by tensor.")
    ] = None,
    num_shards: Annotated[
        int | None, typer.Option("--shards", min=1, help="Number of shards; default: the delta's (sphinx, meta).")
    ] = None,
    overwrite: Overwrite = False,
    allow_nonfinite: AllowNonfinite = False,
    as_json: Json = False,
) -> None:
    """Write BASE + DELTA as a checkpoint.

    Tensors that only one of them has are copied. Base and delta may have different numbers of shards.

    Example:
      sphinxkit delta apply llama2 sphinx_delta -o sphinx
    """
    import sphinxkit
    from sphinxkit.cli.progress import byte_progress

    with byte_progress(f"applying {delta}") as progress:
        result = sphinxkit.apply_delta(
            base,
            delta,
            output,
            format=format,
            dtype=parse_dtype(dtype) if dtype else None,
            num_shards=num_shards,
            overwrite=overwrite,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
        )
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
    else:
        typer.echo(f"wrote {output}", err=True)
