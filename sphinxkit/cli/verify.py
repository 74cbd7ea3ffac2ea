"""``sphinxkit verify``: does this installation compute what the public implementation computes?"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from sphinxkit.cli.completion import complete_checkpoint
from sphinxkit.cli.options import Device, Json, pick_device, pick_dtype

if TYPE_CHECKING:
    from sphinxkit.evaluation.parity import Comparison


def verify(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="Checkpoint (directory, hf://org/repo or nano) with golden.json and golden.safetensors.",
            autocompletion=complete_checkpoint,
        ),
    ],
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="float32 (held to rounding), bfloat16 or float16.")] = "float32",
    as_json: Json = False,
) -> None:
    """Compare a checkpoint with the public implementation.

    It is loaded, asked about the pictures beside it, and its answers and inner values are compared.

    Example:
      sphinxkit verify tests/golden/llama_ens5
    """
    import sphinxkit

    place = pick_device(device)
    tell = None if as_json else (lambda result: typer.echo(_line(result)))
    results = sphinxkit.verify(checkpoint, device=place, dtype=pick_dtype(dtype, place), progress=tell)
    failed = sum(not result.is_equal for result in results)
    if as_json:
        rows = [result.to_dict() for result in results]
        typer.echo(json.dumps({"checkpoint": checkpoint, "comparisons": rows, "failed": failed}))
    else:
        held = sum(result.tolerance is not None for result in results)
        typer.echo(f"{held - failed} of {held} quantities agree with the public implementation")
        if held < len(results):
            typer.echo(f"{len(results) - held} more are shown without a claim: float32 on a CPU is held to rounding")
    if failed:
        raise typer.Exit(1)


def _line(result: Comparison) -> str:
    verdict = "info" if result.tolerance is None else "ok  " if result.is_equal else "FAIL"
    limit = "" if result.tolerance is None else f"  at most {result.tolerance:.0e}"
    return f"{verdict} {result.name:<44} differs by {result.difference:.1e}{limit}"
