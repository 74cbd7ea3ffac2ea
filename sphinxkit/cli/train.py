"""``sphinxkit train``: a stage of training, as its recipe says."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sphinxkit.errors import RecipeError

if TYPE_CHECKING:
    from sphinxkit.recipe import Recipe
    from sphinxkit.training import TrainPlan

# What a run's totals count that should not happen, and how the progress line says it
_FAULTS = {"bad": "bad samples", "too_long": "too long", "truncated": "cut to fit", "skipped_steps": "steps left out"}


def train(
    recipe: Annotated[str, typer.Argument(help="Recipe of kind train: a shipped name or a file.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value, or key.below=value; the value is YAML. May be given several times."),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Refuse to go on with a run that is in the output folder.")
    ] = False,
) -> None:
    """Train; go on where a former run in the same output folder stopped.

    SIGTERM and Ctrl-C save and exit with 143 and 130.

    Examples:

    `sphinxkit train finetune_13b --set init=pretrained --set data_root=/data --set output=runs/finetune`

    `torchrun --nproc-per-node 8 -m sphinxkit.cli train pretrain_13b --set tensor_parallel=2 --set output=runs/real`
    """
    from sphinxkit.acceleration.cpu.host_memory import keep_freed_memory
    from sphinxkit.recipe import Recipe
    from sphinxkit.training import train as run

    keep_freed_memory()
    found = Recipe.find(recipe)
    if found.kind != "train":
        raise RecipeError(f"recipe {recipe}: expected kind train, got kind {found.kind}")
    plan, folder = plan_of(found, settings or [])
    result = run(plan, folder=folder, resume=not fresh, report=_say)
    if os.environ.get("RANK", "0") == "0":  # of torchrun
        typer.echo(f"{result.status} at step {result.step} of {result.num_steps}: {result.folder}", err=True)
    if result.signal is not None:
        raise typer.Exit(128 + result.signal)


def plan_of(recipe: Recipe, settings: Sequence[str]) -> tuple[TrainPlan, Path | None]:
    """The plan of a recipe of kind train, and the folder that its paths may be relative to.

    Args:
        recipe: It.
        settings: See ``override``.
    Raises:
        RecipeError: A setting is not possible, or the recipe is not valid with it.
    """
    from sphinxkit.recipe import Recipe
    from sphinxkit.training import TrainPlan

    document = Recipe(override(recipe.document, settings), recipe.source).document
    plan = TrainPlan(**{key: value for key, value in document.items() if key != "kind"})
    return plan, None if recipe.source is None else recipe.source.parent


def override(document: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """A document with some keys replaced.

    Args:
        document: Of a recipe.
        settings: ``key=value``; a dot goes one level down, the value is YAML ("2e-5" is a number, too).
    Raises:
        RecipeError: A setting without ``=``, a value that is not YAML, or a key below something that has no keys.
    """
    import yaml

    changed: dict[str, Any] = _copy(document)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise RecipeError(f"--set {setting!r}: expected key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"--set {setting!r}: the value is not YAML: {error}") from error
        holder = changed
        *path, last = key.split(".")
        for name in path:
            if holder.get(name) is None:
                holder[name] = {}
            holder = holder[name]
            if not isinstance(holder, dict):
                raise RecipeError(f"--set {setting!r}: {name} has no keys below it")
        holder[last] = _number(value)
    return changed


def _copy(value: Any) -> Any:
    return {key: _copy(nested) for key, nested in value.items()} if isinstance(value, Mapping) else value


def _number(value: Any) -> Any:
    """YAML 1.1 wants a dot in ``2.0e-5``; people do not write one."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def duration(seconds: float) -> str:
    """``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _say(record: Mapping[str, Any]) -> None:
    place = f"step {record['step'] + 1}/{record['num_steps']}"
    if "skipped" in record:
        typer.echo(f"{place}  skipped: {record['skipped']}", err=True)
        return
    losses = record["losses"]
    parts = f" ({', '.join(f'{name} {loss:.4f}' for name, loss in losses.items())})" if len(losses) > 1 else ""
    used = "" if record["mfu"] is None else f"  MFU {record['mfu']:.1%}"
    samples_per_second = record["samples"] / record["seconds"]
    total = record["total"]
    faults = [f"{total[key]:,.0f} {words}" for key, words in _FAULTS.items() if total.get(key)]
    so_far = f"  so far {', '.join(faults)}" if faults else ""
    typer.echo(
        f"{place}  loss {record['loss']:.4f}{parts}  norm {record['grad_norm']:.3f}  lr {record['lr']:.2e}  "
        f"{samples_per_second:.1f} samples/s  {record['tokens_per_second']:,.0f} tokens/s{used}{so_far}  "
        f"{duration(record['seconds_left'])} left",
        err=True,
    )
