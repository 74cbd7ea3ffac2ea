"""``sphinxkit evaluate``: ask a model a benchmark's questions and score its answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sphinxkit.cli.options import Checkpoint, Device, Dtype, Json, RecipeOption, load_model


def evaluate(
    checkpoint: Checkpoint,
    benchmark: Annotated[str, typer.Argument(help="A benchmark (refcocog_val, MME_benchmark, ...) or a task.")],
    annotations: Annotated[Path, typer.Option(help="JSON list of annotations, each with gt_answers.")],
    images: Annotated[Path, typer.Option(help="Folder that the annotations' image paths are relative to.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Answers, as JSON lines; gone on with if it is there.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per call.")] = 8,
    recipe: RecipeOption = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Answer a benchmark's questions greedily and score the answers; a run that was stopped goes on where it was."""
    from rich.console import Console

    import sphinxkit
    from sphinxkit.cli.score import print_report
    from sphinxkit.evaluation import answering, benchmarks, read_annotations

    chosen = benchmarks.get(benchmark)
    questions = read_annotations(annotations)
    target = output or Path(f"{benchmark}.predictions.jsonl")
    model = load_model(checkpoint, recipe, device, dtype)
    manifest = {
        "checkpoint": checkpoint,
        "recipe": recipe,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "sphinxkit": sphinxkit.__version__,
    }
    with Console(stderr=True).status(f"{benchmark}: asking") as status:
        answering.answer_questions(
            model,
            chosen,
            questions,
            images,
            target,
            batch_size=batch_size,
            manifest=manifest,
            progress=lambda done, total: status.update(f"{benchmark}: {done} of {total} questions answered"),
        )
    print_report(benchmarks.score(benchmark, annotations, target), as_json)
