"""``sphinxkit mix``: mix the weights of several models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sphinxkit.cli.command import common_options
from sphinxkit.cli.completion import complete_checkpoint, complete_names, complete_recipe
from sphinxkit.cli.options import Device, Json, Rename
from sphinxkit.errors import DataError, RecipeError

if TYPE_CHECKING:
    from sphinxkit.interpolation.sweep import SweepResult


@common_options("output", "recipe", "method", "beta", "weights", "base", "rules")
def mix(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Models to mix, in any readable format, hf://org/repo or nano.",
            show_default=False,
            autocompletion=complete_checkpoint,
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Directory to write.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", help="Mix recipe; options on the command line override it.", autocompletion=complete_recipe
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="linear, slerp, wise_ft, uniform_soup, greedy_soup, ema, task_arithmetic, ties, dare.",
            autocompletion=complete_names("methods", more=("greedy_soup",)),
        ),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", help="NAME=VALUE for the method, such as density=0.2 or seed=3.")
    ] = None,
    beta: Annotated[
        float | None, typer.Option(help="Weight of the first of two models; 1 gives the first model.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="One weight per model, as 0.5,0.3,0.2.")] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Divide the weights by their sum.")] = False,
    base: Annotated[str | None, typer.Option(help="Common ancestor, for task_arithmetic, ties and dare.")] = None,
    rules: Annotated[
        list[str] | None,
        typer.Option("--rule", help="PATTERN=ACTION, such as `'llm.layers.{0..15}.*=0.3'` or `'vision.*=keep first'`."),
    ] = None,
    overlays: Annotated[
        list[str] | None,
        typer.Option("--overlay", help="Tuned directory over each model, in order; - for none (repeatable)."),
    ] = None,
    rename: Rename = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")] = None,
    format: Annotated[
        str | None, typer.Option("--to", help="sphinxkit, sphinx, meta, hf or safetensors; default: the first's.")
    ] = None,
    num_shards: Annotated[
        int | None, typer.Option("--shards", min=1, help="Tensor-parallel shards (sphinx and meta).")
    ] = None,
    llm_only: Annotated[bool, typer.Option("--llm-only", help="Mix and write only the language models.")] = False,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer (file, directory) of the result, if the models' differ.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing checkpoint.")] = False,
    extrapolate: Annotated[bool, typer.Option("--extrapolate", help="Allow weights outside [0, 1].")] = False,
    allow_nonfinite: Annotated[bool, typer.Option("--allow-nonfinite", help="Allow NaN and Inf.")] = False,
    allow_different_recipes: Annotated[
        bool, typer.Option("--allow-different-recipes", help="Mix models of different structure.")
    ] = False,
    hash_inputs: Annotated[bool, typer.Option("--hash/--no-hash", help="Hash the inputs for the provenance.")] = True,
    sweep: Annotated[
        str | None, typer.Option(help="Try betas START:STOP:STEP, such as 0:1:0.1; needs --score.")
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(help="'COMMAND ... {model}', or python:module:function called with the model in memory."),
    ] = None,
    minimize: Annotated[bool, typer.Option("--minimize", help="A lower score is better.")] = False,
    plot: Annotated[Path | None, typer.Option(help="PNG of score against beta; default sweep.png.")] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Mix the weights of models, from any format to any other.

    Folders of safetensors of any model are mixed by their tensors' names and shapes; what lies beside the first one's
    tensors comes along.

    With `--sweep`, every beta is scored, and the best mix is written if `-o` is given. A Python function gets a model
    in memory that is updated in place. A command gets a directory as {model} and must print the score last.

    Examples:
      sphinxkit mix real synthetic -o mixed --beta 0.5
      sphinxkit mix A B -o C --beta 0.7 --rule 'vision.*=keep first'
      sphinxkit mix A B C -o D --method ties --base llama --option density=0.2
      sphinxkit mix llava tuned_llama -o tuned --beta 0 --rename llm_into_vlm
      sphinxkit mix A B --sweep 0:1:0.1 --score python:my_eval.py:accuracy
    """
    import sphinxkit
    from sphinxkit.cli.options import pick_device
    from sphinxkit.cli.progress import byte_progress
    from sphinxkit.interpolation.rename import parse_rename
    from sphinxkit.interpolation.rules import parse_assignment

    if not models and recipe is None:
        raise RecipeError("name the models to mix")
    with byte_progress("mixing") as progress:
        result = sphinxkit.mix(
            recipe if recipe is not None else models or [],
            output,
            models=models or None,
            method=parse_method(method, option),
            beta=beta,
            weights=parse_weights(weights),
            normalize=normalize or None,
            base=base,
            rules=dict(parse_assignment(text) for text in rules or []),
            overlays=[None if each == "-" else each for each in overlays] if overlays else None,
            rename=parse_rename(rename) if rename else None,
            dtype=dtype,
            format=format,
            num_shards=num_shards,
            llm_only=llm_only or None,
            tokenizer=tokenizer,
            extrapolate=extrapolate or None,
            allow_nonfinite=allow_nonfinite or None,
            allow_different_recipes=allow_different_recipes or None,
            overwrite=overwrite,
            hash_inputs=hash_inputs,
            sweep=sweep,
            score=score,
            minimize=minimize,
            plot=plot or (None if sweep is None else Path("sweep.png")),
            device=pick_device(device),
            progress=progress,
            report=lambda name, value: typer.echo(f"{name}: {value:g}", err=True),
        )
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
        return
    if result.sweep is not None:
        first, second = (Path(model).name or model for model in result.models)
        _print_sweep(result.sweep, first, second)
    typer.echo(f"wrote {' and '.join(str(path) for path in (result.plot, result.path) if path is not None)}", err=True)


def parse_method(name: str | None, options: list[str] | None) -> str | dict[str, Any] | None:
    """Parse ``--method`` and ``--option NAME=NUMBER`` to a recipe's form.

    Raises:
        DataError: Options without a method, or not of this form.
    """
    if not options:
        return name
    if name is None:
        raise DataError("--option belongs to a method: name it with --method")
    parsed: dict[str, Any] = {"type": name}
    for option in options:
        key, equals, text = option.partition("=")
        try:
            parsed[key] = int(text) if text.strip().lstrip("+-").isdigit() else float(text)
        except ValueError as error:
            raise DataError(f"--option {option!r}: expected NAME=NUMBER, for example density=0.2") from error
        if not equals or not key:
            raise DataError(f"--option {option!r}: expected NAME=NUMBER, for example density=0.2")
    return parsed


def parse_weights(text: str | None) -> list[float] | None:
    """``--weights`` as numbers.

    Raises:
        DataError: A value is not a number.
    """
    if text is None:
        return None
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise DataError(f"--weights {text!r}: expected numbers such as 0.5,0.3,0.2") from error


def _print_sweep(result: SweepResult, first: str, second: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("beta", "score", "")
    ends = {0.0: f"{second} alone", 1.0: f"{first} alone"}
    for point in result.points:
        notes = [ends[point.beta]] if point.beta in ends else []
        notes += ["best"] if point == result.best else []
        table.add_row(f"{point.beta:g}", f"{point.score:.6g}", ", ".join(notes))
    Console().print(table)
