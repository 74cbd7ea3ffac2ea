"""SPHINX's claims as ablations on SPHINX-nano: small variants with equal budgets, one result file each."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sphinxkit.atomic import atomic_file
from sphinxkit.errors import RecipeError
from sphinxkit.nano.ablations.metrics import evaluate_variant, summarize
from sphinxkit.nano.ablations.variants import CLAIM_NAMES, ENCODERS, Variant, choose_variants
from sphinxkit.nano.stages.steps import Report, TimeLimit, recipes, train_until
from sphinxkit.recipe import Recipe, build, load
from sphinxkit.recipe.mixing import mix
from sphinxkit.sphinx_model import SphinxModel
from sphinxkit.training import TrainPlan, read_log
from sphinxkit.version import __version__

RESULT_KEYS = ("variant", "seed", "scores", "plan", "seconds", "parameters", "versions")


@dataclass(frozen=True, slots=True)
class AblationPlan:
    """The budget of every variant; all of it our choice.

    Args:
        conversations: Conversations that a variant is trained on.
        batch_size: Conversations in a step.
        num_scenes: Scenes that each task is evaluated on.
        seeds: Seeds of weights, order and scenes; a variant is run with each.
        llm: The language model's sizes where they differ from SPHINX-nano's.
        dtype: Dtype of the arithmetic in training.
    """

    conversations: int = 2304
    batch_size: int = 24
    num_scenes: int = 96
    seeds: tuple[int, ...] = (0, 1)
    llm: Mapping[str, int] = field(
        default_factory=lambda: {"embed_dim": 160, "num_layers": 4, "num_heads": 5, "hidden_dim": 432}
    )
    dtype: str = "bfloat16"

    @property
    def steps(self) -> int:
        """Steps of a variant's training."""
        return max(1, self.conversations // self.batch_size)


def model_document(variant: Variant, plan: AblationPlan) -> dict[str, Any]:
    """The variant's model as a recipe: SPHINX-nano's with a smaller language model and the variant's encoders alone."""
    document: dict[str, Any] = deepcopy(dict(Recipe.from_yaml(recipes() / f"{variant.model}.yaml").document))
    document["llm"] |= plan.llm
    document["tokenizer"] = str(recipes() / document["tokenizer"])
    branches = document["vision"]["branches"]
    for branch in branches:
        branch["encoders"] = [entry for entry in branch["encoders"] if entry["type"] in variant.encoders]
    document["vision"]["branches"] = [branch for branch in branches if branch["encoders"]]
    return document


def training_document(variant: Variant, plan: AblationPlan, seed: int, output: Path) -> dict[str, Any]:
    """The variant's training as a recipe: one of SPHINX-nano's, with the variant's data, model and budget.

    Args:
        variant: The variant.
        plan: The budget.
        seed: Seed of everything random.
        output: Folder of all variants.
    """
    document: dict[str, Any] = deepcopy(dict(Recipe.from_yaml(recipes() / f"{variant.recipe}.yaml").document))
    start = _start(variant, seed, output) if variant.after is None else _run(variant.after, seed, output) / "model"
    data = {name: document["data"][name] for name in variant.streams}
    for name, stream in data.items():
        stream["batch_size"] = round(plan.batch_size * variant.streams[name])
        stream["mixture"] |= {"seed": seed, "options": {**stream["mixture"].get("options", {}), **variant.options}}
    changes = {
        "model": model_document(variant, plan),
        "init_from": str(start),
        "output": str(_run(variant.name, seed, output)),
        "data": data,
        "steps": plan.steps,
        "seed": seed,
        "dtype": plan.dtype,
        "save_every": 50,
    }
    return document | changes


def _run(name: str, seed: int, output: Path) -> Path:
    return output / "runs" / f"{name}-{seed}"


def _start(variant: Variant, seed: int, output: Path) -> Path:
    encoders = "all" if variant.encoders == ENCODERS else "-".join(variant.encoders)
    return output / "starts" / f"{variant.model}-{encoders}-{seed}"


def make_start(variant: Variant, plan: AblationPlan, seed: int, output: Path, encoders: SphinxModel) -> None:
    """Save the model that a variant starts from: trained encoders, everything else random.

    Args:
        variant: The variant.
        plan: The budget, which has the language model's sizes.
        seed: Seed of the random weights.
        output: Folder of all variants.
        encoders: A model with the trained encoders, which are found by their names.
    Raises:
        RecipeError: The model lacks an encoder.
    """
    torch.manual_seed(seed)
    model = build(model_document(variant, plan))
    if model.vision is None or encoders.vision is None:
        raise RecipeError("ablations: there is no vision tower")
    trained = {encoder.name: encoder for branch in encoders.vision.branches for encoder in branch.encoders}
    for branch in model.vision.branches:
        for encoder in branch.encoders:
            if encoder.name not in trained:
                raise RecipeError(
                    f"ablations: the encoders' checkpoint has no {encoder.name}, but {', '.join(trained)}"
                )
            encoder.load_state_dict(trained[encoder.name].state_dict())
    model.save(_start(variant, seed, output))


def find_result(output: Path, variant: Variant, seed: int, plan: AblationPlan) -> Path | None:
    """The variant's result, if it is done.

    Raises:
        RecipeError: It was made with another budget.
    """
    path = output / "results" / f"{variant.name}-{seed}.json"
    if not path.exists():
        return None
    made = json.loads(path.read_text(encoding="utf-8"))["plan"]
    now = json.loads(json.dumps(asdict(plan)))
    changed = [key for key, value in now.items() if key != "seeds" and made.get(key) != value]
    if changed:
        raise RecipeError(
            f"{path}: was made with another budget; what differs: {', '.join(changed)}. Name another folder"
        )
    return path


def _score(variant: Variant, plan: AblationPlan, model: SphinxModel) -> tuple[dict[str, float], dict[str, Any]]:
    """(scores by name, metrics by evaluation set and task)."""
    scores: dict[str, float] = {}
    tasks: dict[str, Any] = {}
    for eval_set in variant.eval_sets:
        found = evaluate_variant(model, eval_set, plan.num_scenes)
        scores |= summarize(eval_set, found)
        tasks[eval_set.name] = {task: asdict(metrics) for task, metrics in found.items()}
    if "real.loss" in scores:
        scores["both.loss"] = (scores["real.loss"] + scores["synthetic.loss"]) / 2
    return scores, tasks


def run_variant(
    variant: Variant,
    seed: int,
    plan: AblationPlan,
    output: Path,
    encoders: Callable[[], SphinxModel],
    limit: TimeLimit,
    report: Report,
) -> bool:
    """Train and evaluate a variant, and resume where an earlier call stopped.

    Args:
        variant: The variant; those that it starts from are done.
        seed: The seed.
        plan: The budget.
        output: Folder of all variants.
        encoders: Gives the model with trained encoders.
        limit: Time limit of the call.
        report: Called with the variant's name and each record.
    Returns:
        Whether its result is written.
    """
    name, began = f"{variant.name}-{seed}", time.perf_counter()
    place, seconds = _run(variant.name, seed, output), 0.0
    if variant.recipe is not None:
        if variant.after is None and not _start(variant, seed, output).exists():
            make_start(variant, plan, seed, output, encoders())
        document = training_document(variant, plan, seed, output)
        training = TrainPlan(**{key: value for key, value in document.items() if key != "kind"})
        if not train_until(training, limit, lambda record: report(name, record)):
            return False
        seconds, began = read_log(place)[-1]["total"]["seconds"], time.perf_counter()
    elif variant.beta is not None and not (place / "model").exists():
        domains = [_run(domain, seed, output) / "model" for domain in ("real", "synthetic")]
        mix(domains, place / "model", beta=variant.beta, overwrite=True)
    model = load(place / "model")
    scores, tasks = _score(variant, plan, model)
    result = {
        "variant": variant.name,
        "seed": seed,
        "claims": list(variant.claims),
        "title": variant.title,
        "scores": scores,
        "tasks": tasks,
        "plan": asdict(plan),
        "steps": 0 if variant.recipe is None else plan.steps,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "versions": {"sphinxkit": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "seconds": {"training": round(seconds, 1), "measuring": round(time.perf_counter() - began, 1)},
    }
    folder = output / "results"
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    report(name, scores)
    return True


def run_ablations(
    output: str | Path,
    encoders: str | Path,
    *,
    plan: AblationPlan | None = None,
    claim: str | None = None,
    minutes: float | None = None,
    report: Report | None = None,
) -> str | None:
    """Run every variant that has no result yet, and resume where an earlier call stopped.

    Args:
        output: Folder of runs and results.
        encoders: Checkpoint with the trained encoders: what the stage ``encoders`` of SPHINX-nano writes.
        plan: The budget; None: the default.
        claim: Run only the variants of this claim.
        minutes: Stop after about this long.
        report: Called with a variant's name and each record.
    Returns:
        The variant that the next call resumes with; None if all are done.
    Raises:
        RecipeError: There is no such claim, or the folder holds results of another budget.
        SphinxkitError: As training.
    """
    budget, limit, place = plan or AblationPlan(), TimeLimit(minutes), Path(output)
    loaded: list[SphinxModel] = []

    def trained() -> SphinxModel:
        if not loaded:
            loaded.append(load(encoders))
        return loaded[0]

    choose_variants(claim)
    say = report or (lambda *_: None)
    for name in CLAIM_NAMES if claim is None else (claim,):
        for seed in budget.seeds:
            for variant in choose_variants(name):
                if find_result(place, variant, seed, budget) is not None:
                    continue
                if limit.is_over or not run_variant(variant, seed, budget, place, trained, limit, say):
                    return f"{variant.name}-{seed}"
    return None


def read_results(folder: str | Path) -> Sequence[Mapping[str, Any]]:
    """Every result in a folder, by file name.

    Args:
        folder: Folder with ``*.json``.
    Raises:
        RecipeError: A file is not a result.
    """
    found = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            found.append({key: document[key] for key in RESULT_KEYS})
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RecipeError(f"{path}: is not the result of a variant ({error!r})") from error
    return found
