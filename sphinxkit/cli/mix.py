"""``sphinxkit mix``: models into one, by weights."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sphinxkit.cli.options import Device, Json
from sphinxkit.errors import DataError, RecipeError

if TYPE_CHECKING:
    from sphinxkit.cli.mixing import OpenedMix
    from sphinxkit.interpolation import MixedSource, MixPlan
    from sphinxkit.interpolation.sweep import SweepResult

GREEDY = "greedy_soup"


def mix(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Models to mix, in any readable format, or hf://org/repo.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory to write; it appears when it is complete.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="A kind: mix recipe; options here override it.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="linear, slerp, wise_ft, uniform_soup, greedy_soup, ema, task_arithmetic, ties, dare."),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", help="NAME=VALUE for the method, such as density=0.2 or seed=3.")
    ] = None,
    beta: Annotated[
        float | None, typer.Option(help="Weight of the first of two models; 1 is the first itself.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="One weight per model, as 0.5,0.3,0.2.")] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Divide the weights by their sum.")] = False,
    base: Annotated[str | None, typer.Option(help="Common ancestor, for task_arithmetic, ties and dare.")] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option("--rule", help="PATTERN=ACTION, such as `'llm.layers.{0..15}.*=0.3'` or `'vision.*=keep first'`."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")] = None,
    to: Annotated[
        str | None, typer.Option("--to", help="sphinxkit, sphinx, meta or hf; default: the first model's format.")
    ] = None,
    num_shards: Annotated[
        int | None, typer.Option("--shards", min=1, help="Tensor-parallel shards (sphinx and meta).")
    ] = None,
    llm_only: Annotated[bool, typer.Option("--llm-only", help="Mix and write the language models alone.")] = False,
    tokenizer: Annotated[str | None, typer.Option(help="tokenizer.model of the result, if the models' differ.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is there.")] = False,
    extrapolate: Annotated[bool, typer.Option("--extrapolate", help="Allow weights outside [0, 1].")] = False,
    allow_nonfinite: Annotated[bool, typer.Option("--allow-nonfinite", help="Let NaN and Inf through.")] = False,
    allow_different_recipes: Annotated[
        bool, typer.Option("--allow-different-recipes", help="Mix although the models' structure differs.")
    ] = False,
    hashes: Annotated[bool, typer.Option("--hash/--no-hash", help="Hash the inputs for the provenance.")] = True,
    sweep: Annotated[
        str | None, typer.Option(help="Try betas START:STOP:STEP, such as 0:1:0.1; needs --score.")
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(help="'COMMAND ... {model}', or python:module:function called with the model in memory."),
    ] = None,
    minimize: Annotated[bool, typer.Option("--minimize", help="The lower score is the better one.")] = False,
    plot: Annotated[Path | None, typer.Option(help="PNG of score against beta; default sweep.png.")] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Mix models by their weights, streamed tensor by tensor from any format to any other.

    With `--sweep` every beta is scored and the best is written if `-o` is given: a Python function gets one model in
    memory that is updated in place, a command gets a directory in place of {model} and prints the score last.

    Examples:

    `sphinxkit mix real synthetic -o mixed --beta 0.5`

    `sphinxkit mix A B -o C --beta 0.7 --rule 'vision.*=keep first' --rule 'llm.layers.{0..15}.*=0.3'`

    `sphinxkit mix A B C -o D --method ties --base llama --option density=0.2`

    `sphinxkit mix A B --sweep 0:1:0.1 --score python:my_eval.py:accuracy -o best`
    """
    from sphinxkit.cli.mixing import open_mix

    fields: dict[str, Any] = {
        "models": models or None,
        "method": _method(method, option),
        "beta": beta,
        "weights": _numbers(weights),
        "base": base,
        "dtype": dtype,
        "format": to,
        "shards": num_shards,
        "tokenizer": tokenizer,
        "llm_only": llm_only or None,
        "normalize": normalize or None,
        "extrapolate": extrapolate or None,
        "allow_nonfinite": allow_nonfinite or None,
        "allow_different_recipes": allow_different_recipes or None,
    }
    greedy = method == GREEDY
    if greedy:
        fields["method"] = "uniform_soup"
    plan = read_plan(recipe, {key: value for key, value in fields.items() if value is not None}, rule or [])
    if (sweep is not None or greedy) != (score is not None):
        raise DataError("--sweep and --method greedy_soup need --score, and --score needs one of them")
    if sweep is not None and score is not None:
        _sweep(plan, sweep, score, output, plot, minimize, device, overwrite, hashes, as_json)
        return
    if output is None:
        raise DataError("say where the mix should go: -o DIRECTORY")
    facts: dict[str, Any] = {}
    if greedy and score is not None:
        plan, facts = _greedy(plan, score, minimize, device, output, overwrite)
    with open_mix(plan, hash_inputs=hashes) as opened:
        _write(opened, opened.mixed, opened.mixed.weights, output, overwrite, facts)
        summary = {
            "output": str(output),
            "weights": list(opened.mixed.weights),
            "tensors": len(opened.mixed.outcomes),
            **facts,
        }
    if as_json:
        typer.echo(json.dumps(summary))
    else:
        typer.echo(f"wrote {output}", err=True)


def read_plan(recipe: str | None, fields: dict[str, Any], rules: list[str]) -> MixPlan:
    """The plan of a recipe (if any) with the command line's fields over it and its rules first.

    Raises:
        RecipeError: The recipe is not of kind mix, or the whole does not make a plan.
    """
    from sphinxkit.interpolation import MixPlan
    from sphinxkit.interpolation.rules import parse_assignment

    document: dict[str, Any] = {}
    folder: Path | None = None
    if recipe is not None:
        from sphinxkit.recipe import Recipe

        found = Recipe.find(recipe)
        if found.kind != "mix":
            raise RecipeError(f"recipe {recipe} is of kind {found.kind}, expected kind mix")
        document = {key: value for key, value in found.document.items() if key != "kind"}
        folder = found.source.parent if found.source else None
        if folder:
            document = vars(MixPlan(**document).relative_to(folder))
    if "beta" in fields:
        document.pop("weights", None)
    if "weights" in fields:
        document.pop("beta", None)
    given = dict(parse_assignment(text) for text in rules)
    fields["rules"] = {**given, **{key: value for key, value in document.get("rules", {}).items() if key not in given}}
    merged = {**document, **fields}
    if not merged.get("models"):
        raise RecipeError("name the models to mix")
    return MixPlan(**merged)


def _method(name: str | None, options: list[str] | None) -> Any:
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


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise DataError(f"--weights {text!r}: expected numbers such as 0.5,0.3,0.2") from error


def _write(
    opened: OpenedMix,
    mixed: MixedSource,
    weights: tuple[float, ...],
    output: Path,
    overwrite: bool,
    facts: dict[str, Any],
) -> None:
    from sphinxkit.cli.mixing import total_bytes
    from sphinxkit.cli.progress import byte_progress

    with byte_progress(f"mixing {len(opened.models)} models", total_bytes(mixed)) as progress:
        opened.write(output, mixed, weights, overwrite=overwrite, progress=progress, facts=facts)


def _scorer(opened: OpenedMix, score: str, device: str) -> Callable[[MixedSource, tuple[float, ...]], float]:
    """What scores a mix: in memory for a Python function, through a temporary directory for a command."""
    from sphinxkit.cli.mixing import LLM
    from sphinxkit.cli.options import pick_device
    from sphinxkit.cli.scoring_function import check_command, is_python, load_callable, number, run_command

    if not is_python(score):
        check_command(score)

        def by_command(mixed: MixedSource, weights: tuple[float, ...]) -> float:
            with tempfile.TemporaryDirectory(prefix="sphinxkit-mix-") as folder:
                target = Path(folder) / "model"
                opened.write(target, mixed, weights)
                return run_command(score, target)

        return by_command

    import sphinxkit
    from sphinxkit.interpolation import update_in_place
    from sphinxkit.interpolation.sources import SelectedSource

    function = load_callable(score)
    model = sphinxkit.load(opened.to_load().path, device=pick_device(device))
    tensors, unused = model.state_dict(), opened.unused_keys()
    if opened.plan.llm_only:
        tensors = {key: tensor for key, tensor in tensors.items() if key.startswith(LLM)}

    def in_memory(mixed: MixedSource, _: tuple[float, ...]) -> float:
        update_in_place(tensors, SelectedSource(mixed, lambda key: key not in unused))
        return number(function(model))

    return in_memory


def _sweep(
    plan: MixPlan,
    text: str,
    score: str,
    output: Path | None,
    plot: Path | None,
    minimize: bool,
    device: str,
    overwrite: bool,
    hashes: bool,
    as_json: bool,
) -> None:
    from dataclasses import replace

    from sphinxkit.cli.mixing import check_weights, file_name, open_mix
    from sphinxkit.interpolation.plots import need_matplotlib, plot_sweep
    from sphinxkit.interpolation.sweep import SweepPoint, parse_range, run_sweep

    betas = parse_range(text)
    need_matplotlib()
    if len(plan.models) != 2:
        raise DataError(f"a sweep is over beta, between two models; got {len(plan.models)}")
    plan = replace(plan, weights=None, beta=betas[0])
    with open_mix(plan, hash_inputs=False) as opened:
        for beta in betas:
            check_weights(replace(plan, beta=beta), opened.method, (beta, 1 - beta))
        if output is not None:
            opened.check_output(output, overwrite=overwrite)
        scorer = _scorer(opened, score, device)

        def evaluate(beta: float) -> float:
            pair = (beta, 1 - beta)
            return scorer(opened.with_weights(pair), pair)

        def report(point: SweepPoint) -> None:
            typer.echo(f"beta {point.beta:g}: {point.score:g}", err=True)

        result = run_sweep(betas, evaluate, minimize=minimize, progress=report)
        first, second = (file_name(model) for model in plan.models)
        picture = plot_sweep(result, plot or Path("sweep.png"), first=first, second=second)
        if output is not None:
            pair = (result.best.beta, 1 - result.best.beta)
            best = opened.with_weights(pair, hash_inputs=hashes)
            _write(opened, best, pair, output, overwrite, {"sweep": {"score": score, **result.to_dict()}})
    if as_json:
        typer.echo(
            json.dumps({**result.to_dict(), "plot": str(picture), "output": None if output is None else str(output)})
        )
        return
    _table(result, first, second)
    typer.echo(f"wrote {picture}" + (f" and {output}" if output else ""), err=True)


def _table(result: SweepResult, first: str, second: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("beta", "score", "")
    ends = {0.0: f"{second} alone", 1.0: f"{first} alone"}
    for point in result.points:
        notes = [ends[point.beta]] if point.beta in ends else []
        notes += ["best"] if point == result.best else []
        table.add_row(f"{point.beta:g}", f"{point.score:.6g}", ", ".join(notes))
    Console().print(table)


def _greedy(
    plan: MixPlan, score: str, minimize: bool, device: str, output: Path, overwrite: bool
) -> tuple[MixPlan, dict[str, Any]]:
    """Score every model and the soups that the greedy recipe tries; the plan of the soup that won."""
    from dataclasses import replace

    from sphinxkit.cli.mixing import open_mix
    from sphinxkit.interpolation.methods.soup import choose_soup

    sign = -1 if minimize else 1
    count = len(plan.models)
    plan = replace(plan, method="linear", beta=None, weights=[1 / count] * count)
    with open_mix(plan, hash_inputs=False) as opened:
        opened.check_output(output, overwrite=overwrite)
        scorer = _scorer(opened, score, device)

        def evaluate(members: tuple[int, ...]) -> float:
            shares = tuple(1 / len(members) if index in members else 0.0 for index in range(count))
            value = sign * scorer(opened.with_weights(shares), shares)
            typer.echo(f"{', '.join(plan.models[index] for index in members)}: {sign * value:g}", err=True)
            return value

        soup = choose_soup([evaluate((index,)) for index in range(count)], evaluate)
    shares = [1 / len(soup.members) if index in soup.members else 0.0 for index in range(count)]
    facts = {"soup": {"members": [plan.models[index] for index in soup.members], "score": sign * soup.score}}
    return replace(plan, weights=shares), facts
