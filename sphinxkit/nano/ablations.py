"""SPHINX's claims as ablations on SPHINX-nano: small arms of equal budgets, one result file each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sphinxkit.atomic import atomic_file
from sphinxkit.errors import RecipeError
from sphinxkit.nano.arms import CLAIMS, ENCODERS, Arm, choose_arms
from sphinxkit.nano.measures import measure, summarize
from sphinxkit.nano.reproduce import Report, Slice, mix_models, recipes, train_slice
from sphinxkit.recipe import Recipe, build, load
from sphinxkit.training import TrainPlan, read_log
from sphinxkit.version import __version__

if TYPE_CHECKING:
    from sphinxkit.sphinx_model import SphinxModel


@dataclass(frozen=True, slots=True)
class AblationPlan:
    """The budget of every arm; all of it our choice.

    Args:
        conversations: That an arm is trained on.
        batch_size: Conversations in a step.
        num_scenes: That each task is measured on.
        seeds: Of weights, order and scenes; an arm is run with each.
        llm: The language model's sizes where they differ from SPHINX-nano's.
        dtype: Of the arithmetic in training.
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
        """Of an arm."""
        return max(1, self.conversations // self.batch_size)


def model_document(arm: Arm, plan: AblationPlan) -> dict[str, Any]:
    """The arm's model: SPHINX-nano's recipe with a smaller language model, and only the arm's encoders."""
    document: dict[str, Any] = deepcopy(dict(Recipe.from_yaml(recipes() / f"{arm.model}.yaml").document))
    document["llm"] |= plan.llm
    document["tokenizer"] = str(recipes() / document["tokenizer"])
    branches = document["vision"]["branches"]
    for branch in branches:
        branch["encoders"] = [entry for entry in branch["encoders"] if entry["type"] in arm.encoders]
    document["vision"]["branches"] = [branch for branch in branches if branch["encoders"]]
    return document


def training_document(arm: Arm, plan: AblationPlan, seed: int, output: Path) -> dict[str, Any]:
    """The arm's training as a recipe: one of SPHINX-nano's, with the arm's data, model and budget.

    Args:
        arm: That is trained.
        plan: The budget.
        seed: Of everything random.
        output: Folder of all arms.
    """
    document: dict[str, Any] = deepcopy(dict(Recipe.from_yaml(recipes() / f"{arm.recipe}.yaml").document))
    start = _start(arm, seed, output) if arm.after is None else _run(arm.after, seed, output) / "model"
    data = {name: document["data"][name] for name in arm.streams}
    for name, stream in data.items():
        stream["batch_size"] = round(plan.batch_size * arm.streams[name])
        stream["mixture"] |= {"seed": seed, "options": {**stream["mixture"].get("options", {}), **arm.options}}
    changes = {
        "model": model_document(arm, plan),
        "init": str(start),
        "output": str(_run(arm.name, seed, output)),
        "data": data,
        "steps": plan.steps,
        "seed": seed,
        "dtype": plan.dtype,
        "save_every": 50,
    }
    return document | changes


def _run(name: str, seed: int, output: Path) -> Path:
    return output / "runs" / f"{name}-{seed}"


def _start(arm: Arm, seed: int, output: Path) -> Path:
    encoders = "all" if arm.encoders == ENCODERS else "-".join(arm.encoders)
    return output / "starts" / f"{arm.model}-{encoders}-{seed}"


def make_start(arm: Arm, plan: AblationPlan, seed: int, output: Path, encoders: SphinxModel) -> None:
    """Save the model that an arm starts from: its encoders as they were trained, everything else random.

    Args:
        arm: Whose start.
        plan: Sizes of the language model.
        seed: Of the random weights.
        output: Folder of all arms.
        encoders: A model with trained encoders, by their names.
    Raises:
        RecipeError: The model lacks an encoder.
    """
    import torch

    torch.manual_seed(seed)
    model = build(model_document(arm, plan))
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
    model.save(_start(arm, seed, output))


def find_result(output: Path, arm: Arm, seed: int, plan: AblationPlan) -> Path | None:
    """The arm's result, if it is done.

    Raises:
        RecipeError: It was made with another budget.
    """
    path = output / "results" / f"{arm.name}-{seed}.json"
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


def _score(arm: Arm, plan: AblationPlan, model: SphinxModel) -> tuple[dict[str, float], dict[str, Any]]:
    scores: dict[str, float] = {}
    tasks: dict[str, Any] = {}
    for wanted in arm.measures:
        found = measure(model, wanted, plan.num_scenes)
        scores |= summarize(wanted, found)
        tasks[wanted.name] = {task: asdict(answers) for task, answers in found.items()}
    if "real.loss" in scores:
        scores["both.loss"] = (scores["real.loss"] + scores["synthetic.loss"]) / 2
    return scores, tasks


def _versions() -> dict[str, str]:
    import platform

    import torch

    return {"sphinxkit": __version__, "torch": torch.__version__, "python": platform.python_version()}


def run_arm(
    arm: Arm,
    seed: int,
    plan: AblationPlan,
    output: Path,
    encoders: Callable[[], SphinxModel],
    share: Slice,
    report: Report,
) -> bool:
    """Train and measure an arm; go on where a former call stopped.

    Args:
        arm: Which; those that it starts from are done.
        seed: Which.
        plan: The budget.
        output: Folder of all arms.
        encoders: Gives the model with trained encoders.
        share: Of the work.
        report: Called with the arm's name and each record.
    Returns:
        Whether its result is written.
    """
    name, began = f"{arm.name}-{seed}", time.perf_counter()
    place, seconds = _run(arm.name, seed, output), 0.0
    if arm.recipe is not None:
        if arm.after is None and not _start(arm, seed, output).exists():
            make_start(arm, plan, seed, output, encoders())
        training = TrainPlan(**_without_kind(training_document(arm, plan, seed, output)))
        if not train_slice(training, share, lambda record: report(name, record)):
            return False
        seconds, began = read_log(place)[-1]["total"]["seconds"], time.perf_counter()
    elif arm.beta is not None and not (place / "model").exists():
        mix_models(
            _run("real", seed, output) / "model", _run("synthetic", seed, output) / "model", arm.beta, place / "model"
        )
    model = load(place / "model")
    scores, tasks = _score(arm, plan, model)
    result = {
        "arm": arm.name,
        "seed": seed,
        "claims": list(arm.claims),
        "title": arm.title,
        "scores": scores,
        "tasks": tasks,
        "plan": asdict(plan),
        "steps": 0 if arm.recipe is None else plan.steps,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "versions": _versions(),
        "seconds": {"training": round(seconds, 1), "measuring": round(time.perf_counter() - began, 1)},
    }
    folder = output / "results"
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    report(name, scores)
    return True


def _without_kind(document: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key != "kind"}


def run_ablations(
    output: str | Path,
    encoders: str | Path,
    *,
    plan: AblationPlan | None = None,
    claim: str | None = None,
    minutes: float | None = None,
    report: Report | None = None,
) -> str | None:
    """Run every arm that has no result yet; go on where a former call stopped.

    Args:
        output: Folder of runs and results.
        encoders: Checkpoint with the trained encoders: what the stage ``encoders`` of SPHINX-nano leaves.
        plan: The budget; None: the default.
        claim: Only its arms.
        minutes: Stop after about this long.
        report: Called with an arm's name and each record.
    Returns:
        The arm that the next call goes on with; None if all are done.
    Raises:
        RecipeError: There is no such claim, or the folder holds results of another budget.
        SphinxkitError: As training.
    """
    budget, share, place = plan or AblationPlan(), Slice(minutes), Path(output)
    loaded: list[SphinxModel] = []

    def trained() -> SphinxModel:
        if not loaded:
            loaded.append(load(encoders))
        return loaded[0]

    choose_arms(claim)
    for name in CLAIMS if claim is None else (claim,):
        for seed in budget.seeds:
            for arm in choose_arms(name):
                if find_result(place, arm, seed, budget) is not None:
                    continue
                if share.is_over or not run_arm(arm, seed, budget, place, trained, share, report or (lambda *_: None)):
                    return f"{arm.name}-{seed}"
    return None


def read_results(folder: str | Path) -> Sequence[Mapping[str, Any]]:
    """Every result in a folder, by file name.

    Args:
        folder: With ``*.json``.
    Raises:
        RecipeError: A file is not a result.
    """
    found = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            found.append(
                {key: document[key] for key in ("arm", "seed", "scores", "plan", "seconds", "parameters", "versions")}
            )
        except (ValueError, KeyError, TypeError) as error:
            raise RecipeError(f"{path}: is not the result of an arm ({error!r})") from error
    return found
