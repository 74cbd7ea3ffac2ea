"""Mixing whole models by their weights: ``sphinxkit.mix``."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sphinxkit.errors import DataError, RecipeError
from sphinxkit.hub import as_text
from sphinxkit.interpolation import MixedSource, MixPlan, update_in_place
from sphinxkit.interpolation.methods.soup import choose_soup
from sphinxkit.interpolation.plots import need_matplotlib, plot_sweep
from sphinxkit.interpolation.sweep import SweepPoint, SweepResult, parse_range, run_sweep
from sphinxkit.recipe.io import load
from sphinxkit.recipe.open_checkpoints import LLM, Progress, with_total
from sphinxkit.recipe.opened_mix import OpenedMix, check_weights, open_mix
from sphinxkit.recipe.recipe import Recipe
from sphinxkit.recipe.scores import check_command, is_python, load_callable, number, run_command
from sphinxkit.sphinx_model import SphinxModel

GREEDY = "greedy_soup"

ModelPath = str | os.PathLike[str]
Score = str | Callable[[SphinxModel], float]
Report = Callable[[str, float], None]
"""Called with what a mix is called ("beta 0.5", or its models) and its score."""


@dataclass(frozen=True)
class ChosenSoup:
    """The models in a greedy soup.

    Attributes:
        members: Their paths, in order of selection.
        score: Score of their mean.
    """

    members: tuple[str, ...]
    score: float


@dataclass(frozen=True)
class MixResult:
    """Result of a mix.

    Attributes:
        path: The checkpoint that was written; None for a sweep without an output.
        method: The method, with its options.
        weights: One per model; for a sweep, those of the best point.
        models: Their paths, in the order of the weights.
        num_tensors: In the result.
        sweep: All scored points, and the best one; None without a sweep.
        soup: Result of a greedy soup; None for other methods.
        plot: The picture of the sweep, if one was asked for.
    """

    path: Path | None
    method: str | dict[str, Any]
    weights: tuple[float, ...]
    models: tuple[str, ...]
    num_tensors: int
    sweep: SweepResult | None = None
    soup: ChosenSoup | None = None
    plot: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        said: dict[str, Any] = {
            "output": None if self.path is None else str(self.path),
            "weights": list(self.weights),
            "tensors": self.num_tensors,
        }
        if self.soup is not None:
            said["soup"] = {"members": list(self.soup.members), "score": self.soup.score}
        if self.sweep is not None:
            said |= {**self.sweep.to_dict(), "plot": None if self.plot is None else str(self.plot)}
        return said


def mix(
    models_or_recipe: Sequence[ModelPath] | ModelPath | Mapping[str, Any] | Recipe | MixPlan,
    output: ModelPath | None = None,
    *,
    models: Sequence[ModelPath] | None = None,
    method: str | Mapping[str, Any] | None = None,
    beta: float | None = None,
    weights: Sequence[float] | None = None,
    normalize: bool | None = None,
    base: ModelPath | None = None,
    rules: Mapping[str, Any] | None = None,
    dtype: torch.dtype | str | None = None,
    overlays: Sequence[ModelPath | None] | None = None,
    rename: str | Mapping[str, str] | None = None,
    format: str | None = None,
    num_shards: int | None = None,
    llm_only: bool | None = None,
    tokenizer: ModelPath | None = None,
    extrapolate: bool | None = None,
    allow_nonfinite: bool | None = None,
    allow_different_recipes: bool | None = None,
    overwrite: bool = False,
    hash_inputs: bool = True,
    sweep: str | Sequence[float] | None = None,
    score: Score | None = None,
    minimize: bool = False,
    plot: ModelPath | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    report: Report | None = None,
) -> MixResult:
    """Mix models by their weights, tensor by tensor, from any format to any other.

    Arguments that are None take the recipe's value, or without a recipe the default of
    :class:`~sphinxkit.interpolation.MixPlan`.

    Args:
        models_or_recipe: A list of models (directories in any readable format, or ``hf://org/repo``), or a recipe of
            kind ``mix``: a shipped name, a path, a dict, a Recipe or a MixPlan.
        output: Directory to write (atomically). A sweep needs none.
        models: The models, instead of the recipe's.
        method: Registered name, or ``{type: name, option: value, ...}``; without a recipe ``linear``. ``greedy_soup``
            averages the models that improve ``score``.
        beta: Weight of the first of two models; the second gets ``1 - beta``.
        weights: One per model, instead of ``beta``.
        normalize: Divide the weights by their sum.
        base: The common ancestor, for task_arithmetic, ties and dare.
        rules: Name pattern -> action for matching tensors; they take precedence over the recipe's.
        dtype: Dtype of the result; None: the models' dtype.
        overlays: For each model in order a tuned directory that is laid over it before the mix, or None.
        rename: Prefixes of the names of all models but the first, and what replaces them; or ``"llm_into_vlm"``: the
            others are language models, whose place in the first is found from the names of both.
        format: sphinxkit, sphinx, meta, hf, or safetensors (folders of any model, by their files' own names); None
            takes the first model's.
        num_shards: Tensor-parallel shards (sphinx and meta).
        llm_only: Mix and write only the language models.
        tokenizer: File or directory of the result's tokenizer, if those of the models differ.
        extrapolate: Allow weights outside [0, 1].
        allow_nonfinite: Allow NaN and Inf.
        allow_different_recipes: Allow models with different recipes; the result has the first model's.
        overwrite: Replace an existing checkpoint at ``output``.
        hash_inputs: Hash the inputs for ``provenance.json``.
        sweep: Betas to try, or ``"START:STOP:STEP"``; the best is written if there is an output.
        score: Score of a sweep or a greedy soup: a function of the model, which is held in memory and updated in place;
            ``"python:module:function"`` or ``"python:file.py:function"``, which names one; or a command in which
            ``{model}`` stands for a directory and whose last line is the score.
        minimize: Whether a lower score is better.
        plot: PNG of the sweep's scores to draw.
        device: Device of the model passed to a Python function.
        progress: Called after each written tensor with its name, its bytes and the total bytes.
        report: Called with every score.
    Returns:
        The path of the mix, and its provenance.
    Raises:
        RecipeError: The recipe is not of kind ``mix``, values contradict each other, or a rule matches nothing.
        DataError: Weights that cannot be used, a missing base, output or score, or a score that is not a number.
        CheckpointError: A model cannot be opened, the models do not fit each other, or the output cannot be written;
            nothing is left behind.
    """
    is_greedy = method == GREEDY
    given = {
        "models": None if models is None else [_written(model) for model in models],
        "method": "uniform_soup" if is_greedy else dict(method) if isinstance(method, Mapping) else method,
        "beta": beta,
        "weights": None if weights is None else [float(weight) for weight in weights],
        "normalize": normalize,
        "base": None if base is None else _written(base),
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "overlays": None if overlays is None else [each and _written(each) for each in overlays],
        "rename": dict(rename) if isinstance(rename, Mapping) else rename,
        "format": format,
        "num_shards": num_shards,
        "llm_only": llm_only,
        "tokenizer": None if tokenizer is None else os.fspath(tokenizer),
        "extrapolate": extrapolate,
        "allow_nonfinite": allow_nonfinite,
        "allow_different_recipes": allow_different_recipes,
    }
    plan = _plan(models_or_recipe, {key: value for key, value in given.items() if value is not None}, rules or {})
    if (sweep is not None or is_greedy) != (score is not None):
        raise DataError("sweep= and greedy_soup need score=, and score= needs one of them")
    target = None if output is None else Path(output)
    judge = None if score is None else _Judge(score, minimize, device, report or (lambda *_: None))
    if sweep is not None and judge is not None:
        picture = None if plot is None else Path(plot)
        return _sweep(plan, sweep, judge, target, picture, overwrite, hash_inputs, progress)
    if target is None:
        raise DataError("say where the mix should go: name an output (-o DIRECTORY)")
    soup = None
    if judge is not None:
        plan, soup = _greedy(plan, judge, target, overwrite)
    with open_mix(plan, hash_inputs=hash_inputs) as opened:
        used = opened.mixed.weights
        result = MixResult(target, plan.method, used, tuple(plan.models), len(opened.mixed.outcomes), soup=soup)
        facts = {key: value for key, value in result.to_dict().items() if key == "soup"}
        opened.write(
            target, opened.mixed, used, overwrite=overwrite, progress=with_total(progress, opened.mixed), facts=facts
        )
    return result


def _plan(
    models_or_recipe: Sequence[ModelPath] | ModelPath | Mapping[str, Any] | Recipe | MixPlan,
    fields: dict[str, Any],
    rules: Mapping[str, Any],
) -> MixPlan:
    """The plan of a recipe or a list of models with ``fields`` over it and ``rules`` first."""
    document: dict[str, Any] = {}
    if isinstance(models_or_recipe, MixPlan):
        document = vars(models_or_recipe)
    elif isinstance(models_or_recipe, str | os.PathLike | Mapping | Recipe):
        named = models_or_recipe
        found = Recipe.find(Path(named) if isinstance(named, os.PathLike) else named).of_kind("mix")
        document = {key: value for key, value in found.document.items() if key != "kind"}
        if found.source:
            document = vars(MixPlan(**document).relative_to(found.source.parent))
    else:
        document = {"models": [_written(model) for model in models_or_recipe]}
    replaced = {"beta": ["weights"], "weights": ["beta"]}
    dropped = {key for name in fields for key in replaced.get(name, ())}
    merged = {key: value for key, value in document.items() if key not in dropped} | fields
    known = document.get("rules", {})
    merged["rules"] = {**rules, **{key: value for key, value in known.items() if key not in rules}}
    if not merged.get("models"):
        raise RecipeError("name the models to mix")
    return MixPlan(**merged)


def _written(path: ModelPath) -> str:
    """A model as a recipe names it; the directory ``Path("nano")`` is not SPHINX-nano."""
    return path if isinstance(path, str) else as_text(Path(path))


@dataclass(frozen=True)
class _Judge:
    """How mixes are scored."""

    score: Score
    minimize: bool
    device: str | torch.device
    report: Report

    @property
    def text(self) -> str:
        """The score as the provenance names it."""
        if isinstance(self.score, str):
            return self.score
        return getattr(self.score, "__qualname__", type(self.score).__qualname__)

    def scorer(self, opened: OpenedMix) -> Callable[[MixedSource, Sequence[float]], float]:
        """What scores a mix: in memory by a Python function, or through a temporary directory by a command."""
        if isinstance(self.score, str) and not is_python(self.score):
            command = self.score
            check_command(command)

            def by_command(mixed: MixedSource, weights: Sequence[float]) -> float:
                with tempfile.TemporaryDirectory(prefix="sphinxkit-mix-") as folder:
                    target = Path(folder) / "model"
                    opened.write(target, mixed, weights)
                    return run_command(command, target)

            return by_command
        function = load_callable(self.score) if isinstance(self.score, str) else self.score
        model = load(opened.to_load().path, device=self.device)
        tensors, unused = model.state_dict(), opened.unused_keys()
        if opened.plan.llm_only:
            tensors = {key: tensor for key, tensor in tensors.items() if key.startswith(LLM)}

        def in_memory(mixed: MixedSource, _: Sequence[float]) -> float:
            update_in_place(tensors, mixed.only(lambda key: key not in unused))
            return number(function(model))

        return in_memory


def _sweep(
    plan: MixPlan,
    sweep: str | Sequence[float],
    judge: _Judge,
    output: Path | None,
    plot: Path | None,
    overwrite: bool,
    hash_inputs: bool,
    progress: Progress | None,
) -> MixResult:
    betas = parse_range(sweep) if isinstance(sweep, str) else [float(beta) for beta in sweep]
    if plot is not None:
        need_matplotlib()
    if len(plan.models) != 2:
        raise DataError(f"a sweep is over beta, between two models; got {len(plan.models)}")
    plan = replace(plan, weights=None, beta=betas[0] if betas else None)
    with open_mix(plan, hash_inputs=False) as opened:
        for beta in betas:
            check_weights(replace(plan, beta=beta), opened.method, (beta, 1 - beta))
        if output is not None:
            opened.check_output(output, overwrite=overwrite)
        scorer = judge.scorer(opened)

        def evaluate(beta: float) -> float:
            pair = (beta, 1 - beta)
            return scorer(opened.with_weights(pair), pair)

        def tell(point: SweepPoint) -> None:
            judge.report(f"beta {point.beta:g}", point.score)

        points = run_sweep(betas, evaluate, minimize=judge.minimize, progress=tell)
        if plot is not None:
            first, second = (Path(model).name or model for model in plan.models)
            plot_sweep(points, plot, first=first, second=second)
        pair = (points.best.beta, 1 - points.best.beta)
        best = opened.with_weights(pair, hash_inputs=hash_inputs and output is not None)
        if output is not None:
            facts = {"sweep": {"score": judge.text, **points.to_dict()}}
            told = with_total(progress, best)
            opened.write(output, best, pair, overwrite=overwrite, progress=told, facts=facts)
    return MixResult(output, plan.method, pair, tuple(plan.models), len(best.outcomes), sweep=points, plot=plot)


def _greedy(plan: MixPlan, judge: _Judge, output: Path, overwrite: bool) -> tuple[MixPlan, ChosenSoup]:
    """Score every model and the soups that the greedy recipe tries; the plan of the soup that won."""
    sign = -1 if judge.minimize else 1
    count = len(plan.models)
    plan = replace(plan, method="linear", beta=None, weights=[1 / count] * count)
    with open_mix(plan, hash_inputs=False) as opened:
        opened.check_output(output, overwrite=overwrite)
        scorer = judge.scorer(opened)

        def evaluate(members: tuple[int, ...]) -> float:
            shares = tuple(1 / len(members) if index in members else 0.0 for index in range(count))
            value = scorer(opened.with_weights(shares), shares)
            judge.report(", ".join(plan.models[index] for index in members), value)
            return sign * value

        soup = choose_soup([evaluate((index,)) for index in range(count)], evaluate)
    shares = [1 / len(soup.members) if index in soup.members else 0.0 for index in range(count)]
    chosen = ChosenSoup(tuple(plan.models[index] for index in soup.members), sign * soup.score)
    return replace(plan, weights=shares), chosen
