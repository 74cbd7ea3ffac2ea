"""``sphinxkit convert``: any checkpoint format to any other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sphinxkit.cli.command import common_options
from sphinxkit.cli.completion import complete_model, complete_names
from sphinxkit.cli.options import (
    LlamaType,
    NoVerify,
    Overlay,
    RecipeOption,
    Replicas,
    TokenizerFile,
    parse_dtype,
    parse_part,
    parse_replicas,
)
from sphinxkit.errors import DataError


@common_options("output", "format", "part", "dtype", "overwrite")
def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="Checkpoint directory, hf://org/repo or nano; with --part encoders also a model recipe.",
            autocompletion=complete_model,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")],
    format: Annotated[
        str,
        typer.Option(
            "--to", help="sphinxkit, sphinx (as released), meta or hf.", autocompletion=complete_names("formats")
        ),
    ] = "sphinxkit",
    num_shards: Annotated[
        int | None, typer.Option("--shards", min=1, help="Tensor-parallel shards (sphinx and meta; default 1).")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")] = None,
    part: Annotated[
        str | None,
        typer.Option(
            "--part", help="Write only this part: llm (all that meta can hold) or encoders; default: everything."
        ),
    ] = None,
    llm_only: Annotated[bool, typer.Option("--llm-only", help="The same as --part llm.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing checkpoint.")] = False,
    recipe: RecipeOption = None,
    no_verify: NoVerify = False,
    replicas: Replicas = "equal",
    llama_type: LlamaType = None,
    overlay: Overlay = None,
    tokenizer: TokenizerFile = None,
) -> None:
    """Convert a checkpoint to another format.

    Unused tensors of released files (such as CLIP's text tower) are kept in a separate file.

    Examples:
      sphinxkit convert released/sphinx_1k -o sphinx_1k
      sphinxkit convert sphinx_13b -o encoders --part encoders --dtype bfloat16
      sphinxkit convert sphinx_1k -o sphinx_1k_hf --to hf
      sphinxkit convert sphinx_1k -o hf_llama --to hf --part llm
    """
    import sphinxkit
    from sphinxkit.cli.progress import byte_progress

    if llm_only and part is not None:
        raise DataError(f"--llm-only and --part {part}: name one of them")
    with byte_progress(f"converting {source}") as progress:
        sphinxkit.convert(
            source,
            output,
            format=format,
            num_shards=num_shards,
            dtype=None if dtype is None else parse_dtype(dtype),
            part="llm" if llm_only else parse_part(part),
            recipe=recipe,
            overwrite=overwrite,
            verify=not no_verify,
            replicas=parse_replicas(replicas),
            llama_type=llama_type,
            overlay=overlay,
            tokenizer=tokenizer,
            progress=progress,
        )
    typer.echo(f"wrote {output}", err=True)
