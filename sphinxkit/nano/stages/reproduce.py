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

SHIPPED = "mixed_together"
"""The stage whose weights the package holds."""


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


def _trained(*names: str) -> dict[str, tuple[str, Stage]]:
    """Entries of ``STAGES`` that train, by their recipes' names."""
    return {name: (f"{name}/model", _training(name)) for name in names}


def _mixed(name: str, tuned: str, before: str, beta: float) -> dict[str, tuple[str, Stage]]:
    """An entry of ``STAGES`` that mixes a tuned model with the one before."""
    result = f"{name}/model"
    return {name: (result, _mixing(result, (tuned, before), beta))}


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
        output / SHIPPED / "model",
        output / "scores_any_size",
        should_stop=lambda: limit.is_over,
        report=lambda record: report("scores_any_size", record),
    )


STAGES: Mapping[str, tuple[str, Stage]] = {
    "encoders": ("encoders/model", _encoders),
    **_trained("pretrain_real", "pretrain_synthetic"),
    "mixed": ("mixed", _mixing("mixed", ("pretrain_real", "pretrain_synthetic"), BETA)),
    **_trained("finetune", "finetune_more", "finetune_vqa"),
    "scores_one_view": ("scores_one_view/scores.json", _scores("finetune_vqa", "scores_one_view")),
    **_trained("finetune_subimages", "finetune_any_size"),
    **_mixed("mixed_any_size", "finetune_any_size", "finetune_subimages", ANY_SIZE_BETA),
    **_trained("finetune_choices"),
    **_mixed("mixed_choices", "finetune_choices", "mixed_any_size", CHOICES_BETA),
    **_trained("finetune_sizes_and_choices"),
    **_mixed("mixed_sizes_and_choices", "finetune_sizes_and_choices", "mixed_choices", FULL_BETA),
    **_trained("finetune_hard_choices", "finetune_lookups"),
    **_mixed("mixed_lookups", "finetune_lookups", "mixed_sizes_and_choices", LOOKUPS_BETA),
    **_trained("finetune_letters", "finetune_words", "finetune_together"),
    **_mixed(SHIPPED, "finetune_together", "mixed_lookups", TOGETHER_BETA),
    "scores": ("scores/scores.json", _scores(SHIPPED, "scores")),
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
