"""``sphinxkit evaluate``: run and score a benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sphinxkit.cli.command import common_options
from sphinxkit.cli.completion import complete_names
from sphinxkit.cli.options import Checkpoint, Json, LoadOptions, option_groups
from sphinxkit.hub import name_in_record


@common_options("annotations", "images", "output", "batch_size", "device", "as_json")
@option_groups
def evaluate(
    *,
    checkpoint: Checkpoint,
    benchmark: Annotated[
        str,
        typer.Argument(
            help="A benchmark (`sphinxkit list benchmarks`) or a task.",
            autocompletion=complete_names("benchmarks", "tasks"),
        ),
    ],
    annotations: Annotated[Path, typer.Option(help="JSON list of annotations, each with question and gt_answers.")],
    images: Annotated[Path, typer.Option(help="Base folder of the annotations' image paths.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Predictions, one JSON line each. Default: BENCHMARK.predictions.jsonl."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per batch.")] = 8,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum answer length in tokens. Default: the benchmark's.")
    ] = None,
    strip_prefix: Annotated[str, typer.Option(help="Prefix to remove from every image path (data/coco/).")] = "",
    loading: LoadOptions,
    as_json: Json = False,
) -> None:
    """Run a benchmark with greedy decoding and score the answers.

    The same command resumes a stopped run. A question with an unreadable image is reported, scored as an empty answer
    and asked again in the next run. The exit code is then 1; it is also 1 if no answer can be parsed.

    Examples:
      sphinxkit evaluate nano refcocog_val --annotations val.json --images /data
      sphinxkit evaluate nano pose --annotations people.json --images photos
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    import sphinxkit
    from sphinxkit.cli.score import print_report
    from sphinxkit.evaluation import benchmarks

    name = benchmarks.get(benchmark).name
    model = loading.load(checkpoint)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)
        report = sphinxkit.evaluate(
            model,
            name,
            annotations,
            images,
            output,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            strip_prefix=strip_prefix,
            run_facts={"model": name_in_record(checkpoint), "device": str(model.device)},
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print_report(report, as_json)
