"""SPHINX-nano from nothing: every stage in order, in slices that go on where the last one stopped."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sphinxkit.errors import RecipeError
from sphinxkit.nano.perception import PerceptionPlan, train_encoders
from sphinxkit.nano.scores import evaluate_nano
from sphinxkit.recipe import Recipe, build, shipped_folder
from sphinxkit.registry import suggest
from sphinxkit.training import TrainPlan, train

Report = Callable[[str, Mapping[str, Any]], None]

Stage = Callable[[Path, "Slice", Report], bool]

RECIPES_OUTPUT = "runs/nano"
"""Where the recipes of ``recipes/nano`` put their runs; replaced by the folder that is asked for."""

BETA = 0.5
"""Weight of the real domain's model in the mix; SPHINX's own default."""


@dataclass
class Slice:
    """A share of the work: until it is over, or for so many minutes.

    Args:
        minutes: None: until everything is done.
    """

    minutes: float | None = None
    began: float = field(default_factory=time.monotonic)

    @property
    def is_over(self) -> bool:
        """Whether the time is spent."""
        return self.minutes is not None and time.monotonic() - self.began > 60 * self.minutes


def recipes() -> Path:
    """The folder of SPHINX-nano's recipes."""
    return shipped_folder() / "nano"


def _encoders(output: Path, share: Slice, report: Report) -> bool:
    import torch

    torch.manual_seed(0)
    model = build(Recipe.from_yaml(recipes() / "model.yaml"))
    if model.vision is None:
        raise RecipeError("nano/model.yaml: there is no vision tower")
    encoders = [encoder for branch in model.vision.branches for encoder in branch.encoders]
    folder = output / "encoders"
    is_done = train_encoders(
        encoders,
        PerceptionPlan(),
        folder,
        should_stop=lambda: share.is_over,
        report=lambda record: report("encoders", record),
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    if is_done:
        model.save(folder / "model", overwrite=True)
    return is_done


def train_slice(plan: TrainPlan, share: Slice, report: Callable[[Mapping[str, Any]], None]) -> bool:
    """Train until the run is done or the share is over.

    Args:
        plan: What to do; paths beside SPHINX-nano's recipes are found.
        share: Of the work.
        report: Called with each record of the log.
    Returns:
        Whether the run is done.
    """

    def told(record: Mapping[str, Any]) -> None:
        report(record)
        if share.is_over:
            os.kill(os.getpid(), signal.SIGTERM)  # the run saves and returns

    return train(plan, folder=recipes(), report=told).status == "done"


def _training(name: str) -> Stage:
    def run(output: Path, share: Slice, report: Report) -> bool:
        return train_slice(training_plan(name, output), share, lambda record: report(name, record))

    return run


def training_plan(name: str, output: str | Path) -> TrainPlan:
    """A stage's plan with its folders below ``output``.

    Args:
        name: A recipe of ``recipes/nano``.
        output: Folder of all stages.
    """
    document = dict(Recipe.from_yaml(recipes() / f"{name}.yaml").document)
    del document["kind"]
    for key in ("init", "output"):
        document[key] = str(document[key]).replace(RECIPES_OUTPUT, str(output), 1)
    return TrainPlan(**document)


def mix_models(real: Path, synthetic: Path, beta: float, target: Path) -> None:
    """Combine two models' weights: ``beta * real + (1 - beta) * synthetic``.

    Args:
        real: The real domain's checkpoint; recipe and tokenizer are its own.
        synthetic: The synthetic domain's.
        beta: Weight of the first.
        target: Folder of the mix.

    Source: SPHINX, arXiv:2311.07575, section 3.1.
    """
    from sphinxkit import checkpoint
    from sphinxkit.interpolation import MixedSource, create

    with checkpoint.open(real) as first, checkpoint.open(synthetic) as second:
        mixed = MixedSource([first, second], create("linear"), [beta, 1 - beta])
        recipe = (real / "recipe.yaml").read_text(encoding="utf-8")
        tokenizer = (real / "tokenizer.model").read_bytes()
        checkpoint.save(target, mixed, recipe_yaml=recipe, tokenizer=tokenizer, overwrite=True)


def _mix(output: Path, share: Slice, report: Report) -> bool:
    mix_models(output / "pretrain_real" / "model", output / "pretrain_synthetic" / "model", BETA, output / "mixed")
    report("mixed", {"beta": BETA})
    return True


def _scores(name: str, folder: str) -> Stage:
    def run(output: Path, share: Slice, report: Report) -> bool:
        return evaluate_nano(
            output / name / "model",
            output / folder,
            should_stop=lambda: share.is_over,
            report=lambda record: report(folder, record),
        )

    return run


STAGES: Mapping[str, tuple[str, Stage]] = {
    "encoders": ("encoders/model", _encoders),
    "pretrain_real": ("pretrain_real/model", _training("pretrain_real")),
    "pretrain_synthetic": ("pretrain_synthetic/model", _training("pretrain_synthetic")),
    "mixed": ("mixed", _mix),
    "finetune": ("finetune/model", _training("finetune")),
    "finetune_more": ("finetune_more/model", _training("finetune_more")),
    "finetune_vqa": ("finetune_vqa/model", _training("finetune_vqa")),
    "scores_one_view": ("scores_one_view/scores.json", _scores("finetune_vqa", "scores_one_view")),
    "finetune_subimages": ("finetune_subimages/model", _training("finetune_subimages")),
    "scores": ("scores/scores.json", _scores("finetune_subimages", "scores")),
}
"""What each stage writes when it is done, below the output folder, and what does it; in order."""


def reproduce(
    output: str | Path, *, minutes: float | None = None, last: str | None = None, report: Report | None = None
) -> str | None:
    """Train and score SPHINX-nano from nothing; go on where a former call stopped.

    Args:
        output: Folder of all stages' runs.
        minutes: Stop after about this long; call again to go on. None: go on to the end.
        last: Stop behind this stage.
        report: Called with a stage's name and each record of its log.
    Returns:
        The stage that the next call goes on with; None if everything is done.
    Raises:
        RecipeError: There is no such stage, or the folder holds a run of other recipes.
        SphinxkitError: As the stages.
    """
    if last is not None and last not in STAGES:
        raise RecipeError(
            f"reproduce: there is no stage {last!r}{suggest(last, STAGES) or '.'} Stages: {', '.join(STAGES)}"
        )
    share, place = Slice(minutes), Path(output)
    for name, (result, run) in STAGES.items():
        if not (place / result).exists() and (share.is_over or not run(place, share, report or (lambda *_: None))):
            return name
        if name == last:
            break
    return None
