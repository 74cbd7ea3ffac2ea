"""``sphinxkit verify``: does this installation compute what the public implementation computes?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sphinxkit.cli.options import Device, Json, load_model

if TYPE_CHECKING:
    from sphinxkit.evaluation.parity import Comparison


def verify(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint directory with golden.json and golden.safetensors.")],
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="float32 (held to rounding), bfloat16 or float16.")] = "float32",
    as_json: Json = False,
) -> None:
    """Load a checkpoint, answer about its pictures, and compare with the public implementation.

    Example:

    `sphinxkit verify tests/golden/llama_ens5`
    """
    from sphinxkit.evaluation.parity import GoldenData, compare

    golden = GoldenData(checkpoint)
    model = load_model(str(checkpoint), None, device, dtype)
    results = []
    for result in compare(model, golden):
        results.append(result)
        if not as_json:
            typer.echo(_line(result))
    failed = sum(not result.is_equal for result in results)
    if as_json:
        rows = [
            {"name": r.name, "difference": r.difference, "tolerance": r.tolerance, "is_equal": r.is_equal}
            for r in results
        ]
        typer.echo(json.dumps({"checkpoint": str(checkpoint), "comparisons": rows, "failed": failed}))
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
