"""Trains SPHINX-nano from scratch: all stages in order; a call resumes an earlier one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sphinxkit.errors import RecipeError
from sphinxkit.nano.perception.training import PerceptionPlan, train_encoders
from sphinxkit.nano.stages.any_size import PICTURES_FILE, evaluate_any_size
from sphinxkit.nano.stages.scores import evaluate_nano
from sphinxkit.nano.stages.steps import Report, TimeLimit, recipes, train_until, training_plan
from sphinxkit.recipe import Recipe, build
from sphinxkit.recipe.mixing import mix
from sphinxkit.registry import suggest

Stage = Callable[[Path, TimeLimit, Report], bool]
"""(output folder, time limit, report) to whether the stage is done."""

BETA = 0.5
"""Weight of the real domain's model in the mix: SPHINX's default. Source: arXiv:2311.07575, section 3.1."""

ANY_SIZE_BETA = 0.6
"""Weight of the model tuned on pictures of any size in its mix with the one before; our choice, between 0.5 and 0.75,
which were tried on scenes of another seed. Source: Wortsman et al., WiSE-FT, arXiv:2109.01903."""

CHOICES_BETA = 0.7
"""Weight of the model tuned on multiple choice in its mix with the one before; our choice, among 0.5 to 0.8."""

FULL_BETA = 0.8
"""Weight of the model tuned once more on all sizes and multiple choice in its mix with the one before; our choice,
between 0.7 and 0.85, which were tried on scenes of another seed."""

LOOKUPS_BETA = 0.7
"""Weight of the model tuned on the hard choices in its mix with the one before; our choice, among 0.5 to 1."""

TOGETHER_BETA = 0.85
"""Weight of the model that learned spelled choices in its mix with the one before; our choice, among 0.5 to 1."""


def _encoders(output: Path, limit: TimeLimit, report: Report) -> bool:
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
        should_stop=lambda: limit.is_over,
        report=lambda record: report("encoders", record),
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    if is_done:
        model.save(folder / "model", overwrite=True)
    return is_done


def _training(name: str) -> Stage:
    def run(output: Path, limit: TimeLimit, report: Report) -> bool:
        return train_until(training_plan(name, output), limit, lambda record: report(name, record))

    return run


def _mixing(result: str, models: Sequence[str], beta: float) -> Stage:
    def run(output: Path, limit: TimeLimit, report: Report) -> bool:
        mix([output / name / "model" for name in models], output / result, beta=beta, overwrite=True)
        report(result.split("/")[0], {"beta": beta})
        return True

    return run


def _scores(name: str, folder: str) -> Stage:
    def run(output: Path, limit: TimeLimit, report: Report) -> bool:
        return evaluate_nano(
            output / name / "model",
            output / folder,
            should_stop=lambda: limit.is_over,
            report=lambda record: report(folder, record),
        )

    return run


def _any_size(output: Path, limit: TimeLimit, report: Report) -> bool:
    return evaluate_any_size(
        output / "mixed_together" / "model",
        output / "scores_any_size",
        should_stop=lambda: limit.is_over,
        report=lambda record: report("scores_any_size", record),
    )


STAGES: Mapping[str, tuple[str, Stage]] = {
    "encoders": ("encoders/model", _encoders),
    "pretrain_real": ("pretrain_real/model", _training("pretrain_real")),
    "pretrain_synthetic": ("pretrain_synthetic/model", _training("pretrain_synthetic")),
    "mixed": ("mixed", _mixing("mixed", ("pretrain_real", "pretrain_synthetic"), BETA)),
    "finetune": ("finetune/model", _training("finetune")),
    "finetune_more": ("finetune_more/model", _training("finetune_more")),
    "finetune_vqa": ("finetune_vqa/model", _training("finetune_vqa")),
    "scores_one_view": ("scores_one_view/scores.json", _scores("finetune_vqa", "scores_one_view")),
    "finetune_subimages": ("finetune_subimages/model", _training("finetune_subimages")),
    "finetune_any_size": ("finetune_any_size/model", _training("finetune_any_size")),
    "mixed_any_size": (
        "mixed_any_size/model",
        _mixing("mixed_any_size/model", ("finetune_any_size", "finetune_subimages"), ANY_SIZE_BETA),
    ),
    "finetune_choices": ("finetune_choices/model", _training("finetune_choices")),
    "mixed_choices": (
        "mixed_choices/model",
        _mixing("mixed_choices/model", ("finetune_choices", "mixed_any_size"), CHOICES_BETA),
    ),
    "finetune_sizes_and_choices": ("finetune_sizes_and_choices/model", _training("finetune_sizes_and_choices")),
    "mixed_sizes_and_choices": (
        "mixed_sizes_and_choices/model",
        _mixing("mixed_sizes_and_choices/model", ("finetune_sizes_and_choices", "mixed_choices"), FULL_BETA),
    ),
    "finetune_hard_choices": ("finetune_hard_choices/model", _training("finetune_hard_choices")),
    "finetune_lookups": ("finetune_lookups/model", _training("finetune_lookups")),
    "mixed_lookups": (
        "mixed_lookups/model",
        _mixing("mixed_lookups/model", ("finetune_lookups", "mixed_sizes_and_choices"), LOOKUPS_BETA),
    ),
    "finetune_letters": ("finetune_letters/model", _training("finetune_letters")),
    "finetune_words": ("finetune_words/model", _training("finetune_words")),
    "finetune_together": ("finetune_together/model", _training("finetune_together")),
    "mixed_together": (
        "mixed_together/model",
        _mixing("mixed_together/model", ("finetune_together", "mixed_lookups"), TOGETHER_BETA),
    ),
    "scores": ("scores/scores.json", _scores("mixed_together", "scores")),
    "scores_any_size": (f"scores_any_size/{PICTURES_FILE}", _any_size),
}
"""The stages in order: what each writes below the output folder when it is done, and what runs it."""


def reproduce_nano(
    output: str | Path, *, minutes: float | None = None, last: str | None = None, report: Report | None = None
) -> str | None:
    """Train and score SPHINX-nano from nothing, and resume where an earlier call stopped.

    The last stages write ``scores/scores.json``, which ``scores.table`` renders, and ``scores_any_size/any_size.json``,
    which ``any_size.any_size_table`` does.

    Args:
        output: Folder of all stages' runs.
        minutes: Stop after about this long; call again to resume. None: work to the end.
        last: Stop after this stage.
        report: Called with a stage's name and each record of its log.
    Returns:
        The stage that the next call resumes with; None if everything is done.
    Raises:
        RecipeError: There is no such stage, or the folder holds a run of other recipes.
        SphinxkitError: As the stages.
    """
    if last is not None and last not in STAGES:
        raise RecipeError(
            f"reproduce: there is no stage {last!r}{suggest(last, STAGES) or '.'} Stages: {', '.join(STAGES)}"
        )
    limit, place = TimeLimit(minutes), Path(output)
    for name, (result, run) in STAGES.items():
        if not (place / result).exists() and (limit.is_over or not run(place, limit, report or (lambda *_: None))):
            return name
        if name == last:
            break
    return None
