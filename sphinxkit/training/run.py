"""``sphinxkit.train``: the one call of a training run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sphinxkit.recipe import Recipe
from sphinxkit.training.callbacks import Callback, TrainResult
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
    """Train from a recipe; resumes a previous run in the same output folder.

    Every process that torchrun started calls this. The output folder holds the log ``log.jsonl``, checkpoints in
    ``checkpoints/``, the exported model in ``model/`` (for ``sphinxkit.load``) and the loss plot ``loss.png``. In the
    main thread, SIGTERM and SIGINT save the state and end the run after the current step.

    Args:
        recipe: Train recipe: a shipped name, a file, a document, a ``Recipe`` or a ``TrainPlan``.
        overrides: Recipe keys to replace: ``{"lr": 1e-4, "data.text.weight": 0.5}``, or the command
            line's ``["lr=1e-4"]``.
        should_stop: Called after every step. If it returns True in any process, the run saves its state and returns.
            The same call resumes it.
        callbacks: Called in the first process, in order, after the run's own log.
        resume: Resume a previous run in the output folder; False: a previous run is an error.
    Raises:
        TrainingError: The run cannot start, resume or continue; or another process trains in the same folder.
        RecipeError, CheckpointError, DataError: The recipe, a checkpoint or the data are not valid.
    """
    plan, folder = read_plan(recipe, overrides)
    model_recipe = find_recipe(plan, folder)
    with open_parallel_dims(plan) as dims, ExitStack() as stack:
        _lock(stack, Path(plan.output), dims)
        signals = stack.enter_context(Signals().caught())
        # not kept in a variable: tensors that outlive their process group abort the process at exit
        return TrainLoop(plan, model_recipe, dims, folder, resume=resume, callbacks=callbacks).run(signals, should_stop)


def _lock(stack: ExitStack, output: Path, dims: ParallelDims) -> None:
    """The first process locks the folder for all."""
    with dims.shared_errors():
        if dims.is_main:
            stack.enter_context(lock_folder(output))
