"""``sphinxkit convert-data``: annotation files to conversation JSON lines."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from sphinxkit.cli.command import common_options
from sphinxkit.cli.completion import complete_names


@common_options("format_name", "task", "output", "companion", "limit")
def convert_data(
    source: Annotated[Path, typer.Argument(help="Annotation file or folder.")],
    format_name: Annotated[
        str,
        typer.Option(
            "--format",
            help="llava (also ShareGPT4V), vqav2, gqa, ocrvqa, textvqa, textcaps, docvqa, infographicvqa, chartqa, "
            "scienceqa, aokvqa, coco, lvis, objects365, publaynet, doclaynet, refcoco, visual_genome, flickr30k or "
            "imagefolder.",
            autocompletion=complete_names("data-formats"),
        ),
    ],
    task: Annotated[str | None, typer.Option(help="Task to write; default: the format's first.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; default: stdout.")] = None,
    companion: Annotated[
        Path | None,
        typer.Option(
            help="The format's second file: VQAv2's annotations, TextVQA's OCR, image_data.json, refs(...).p."
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Read only this split, if records name one.")] = None,
    image_prefix: Annotated[str, typer.Option(help="Prefix for every image path.")] = "",
    wording: Annotated[
        int | None, typer.Option(min=0, help="The task's wording with this number; default: all, drawn by record.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="A malformed record is an error.")] = False,
    limit: Annotated[int | None, typer.Option(min=0, help="Stop after this many conversations.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as one JSON object; needs --output.")
    ] = False,
) -> None:
    """Convert annotations to conversations, as JSON lines.

    The lines are LLaVA's. Records are streamed, in bounded memory.

    Examples:
      sphinxkit convert-data instances.json --format coco -o detection.jsonl
      sphinxkit convert-data asked.json --format vqav2 --companion answers.json
    """
    from rich.console import Console

    import sphinxkit

    if as_json and output is None:
        raise typer.BadParameter("--json needs --output, as the conversations would go to stdout as well")
    console = Console(stderr=True)
    with console.status(f"converting {source}") as status:
        report = sphinxkit.convert_data(
            source,
            format_name,
            task,
            output,
            companion=companion,
            split=split,
            stream=sys.stdout if output is None else None,
            image_prefix=image_prefix,
            wording=wording,
            strict=strict,
            limit=limit,
            progress=lambda count: status.update(f"converting {source}: {count} conversations"),
        )
    for problem in report.malformed:
        typer.echo(f"malformed: {problem.file}:{problem.line}: {problem.reason}", err=True)
    if report.num_malformed > len(report.malformed):
        where = f", all of them in {report.malformed_file}" if report.malformed_file else ""
        typer.echo(f"malformed: {report.num_malformed - len(report.malformed)} more{where}", err=True)
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
    else:
        summary = f"{report.num_written} conversations, {report.num_malformed} malformed records left out"
        typer.echo(f"{report.output or 'stdout'}: {summary}", err=output is None)
