"""``sphinxkit convert``: any checkpoint format to any other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sphinxkit.cli.options import Checkpoint, parse_dtype


def convert(
    source: Checkpoint,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write; replaced when complete.")],
    to: Annotated[str, typer.Option("--to", help="sphinxkit, sphinx (as released), meta or hf.")] = "sphinxkit",
    num_shards: Annotated[int, typer.Option("--shards", min=1, help="Tensor-parallel shards (sphinx, meta).")] = 1,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")] = None,
    part: Annotated[str, typer.Option(help="all, or llm: the language model alone (meta and hf hold no more).")] = "all",
) -> None:
    """Convert a checkpoint, tensor by tensor.

    What the released files hold beyond the model (CLIP's text side and the like) is carried along in a file of its own.

    Examples:

    `sphinxkit convert released/sphinx_1k -o sphinx_1k`

    `sphinxkit convert sphinx_1k -o hf_llama --to hf --part llm --dtype bfloat16`
    """
    from sphinxkit import checkpoint

    with checkpoint.open(checkpoint.resolve(source)) as opened:
        checkpoint.convert(
            opened,
            output,
            format=to,
            num_shards=num_shards,
            dtype=None if dtype is None else parse_dtype(dtype),
            part=part,
        )
    typer.echo(f"wrote {output}", err=True)
