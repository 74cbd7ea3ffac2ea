"""``sphinxkit.train``: the one call of a training run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sphinxkit.recipe import Recipe
from sphinxkit.training.callbacks import Callback, TrainResult
from sphinxkit.training.errors import TrainingError
from sphinxkit.training.loop import TrainLoop
from sphinxkit.training.overrides import Overrides, read_plan
from sphinxkit.training.parallel import ParallelDims, open_parallel_dims
from sphinxkit.training.plan import TrainPlan
from sphinxkit.training.run_lock import lock_folder
from sphinxkit.training.signals import Signals
from sphinxkit.training.trainable_model import find_recipe


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe | TrainPlan,
    *,
    overrides: Overrides | None = None,
    should_stop: Callable[[], bool] | None = None,
    callbacks: Sequence[Callback] = (),
    resume: bool = True,
) -> TrainResult:
    """Train as a recipe says, and resume a former run in the same output folder.

    Every process that torchrun started calls this. In the output folder, the log is ``log.jsonl``, checkpoints are
    below ``checkpoints/``, the model that ``sphinxkit.load`` reads is ``model/``, the plot of the losses is
    ``loss.png``. In the main thread SIGTERM and SIGINT end the run after the step, with its state saved.

    Args:
        recipe: Of kind train: a shipped name, a file, a document, a ``Recipe`` or a ``TrainPlan``.
        overrides: Keys of the recipe that are replaced: ``{"lr": 1e-4, "data.text.weight": 0.5}``, or the command
            line's ``["lr=1e-4"]``.
        should_stop: Asked after every step; the run saves its state and returns when it says True in any process. The
            same call resumes it.
        callbacks: Called in the first process, in order, after the run's own log.
        resume: Whether a former run in the output folder is resumed; else it is an error.
    Raises:
        TrainingError: The run cannot start, be resumed or go on; or another process trains in the same folder.
        RecipeError, CheckpointError, DataError: As its parts.
    """
    plan, folder = read_plan(recipe, overrides)
    model_recipe = find_recipe(plan, folder)
    with open_parallel_dims(plan) as dims, ExitStack() as stack:
        _lock(stack, Path(plan.output), dims)
        signals = stack.enter_context(Signals().caught())
        # not kept in a variable: tensors that outlive their process group abort the process at exit
        return TrainLoop(plan, model_recipe, dims, folder, resume=resume, callbacks=callbacks).run(signals, should_stop)


def _lock(stack: ExitStack, output: Path, dims: ParallelDims) -> None:
    """The first process holds the folder's lock for all."""
    error: TrainingError | None = None
    if dims.is_main:
        try:
            stack.enter_context(lock_folder(output))
        except TrainingError as found:
            error = found
    dims.raise_any(error)
