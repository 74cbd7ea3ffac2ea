"""The training loop: read, update, log, save; starts or resumes a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sphinxkit.data.permutation import derive_key
from sphinxkit.errors import SphinxkitError
from sphinxkit.recipe import Recipe
from sphinxkit.training.callbacks import Callback, TrainResult
from sphinxkit.training.encoder_cache import cache_encoders
from sphinxkit.training.errors import TrainingError
from sphinxkit.training.evaluation import Evaluator
from sphinxkit.training.export import export
from sphinxkit.training.log import LossPlot, RunLog, TensorBoard, WandB
from sphinxkit.training.metrics import StepMeter
from sphinxkit.training.optim import hidden_matrices, learning_rate, make_optimizer
from sphinxkit.training.parallel import DTYPES, ParallelDims
from sphinxkit.training.plan import TrainPlan
from sphinxkit.training.profile import PROFILE_FILE, StepProfile
from sphinxkit.training.resume import find_resume_step
from sphinxkit.training.signals import Signals
from sphinxkit.training.state import CHECKPOINTS, RunStore
from sphinxkit.training.step import NonFiniteError, TrainStep
from sphinxkit.training.streams import StepData, Streams
from sphinxkit.training.trainable_model import build_trainable
from sphinxkit.version import __version__

MAX_SKIPPED = 10  # steps in a row without an update before a run stops; our choice


class TrainLoop:
    """A run, ready for its next step.

    Args:
        plan: The training plan.
        recipe: The model's recipe.
        dims: Process layout.
        folder: Base folder of the plan's relative paths.
        resume: Whether to resume a previous run in the output folder.
        callbacks: Called in the first process, after the run's own log.
    Raises:
        TrainingError: The run cannot start or be resumed.
        RecipeError, CheckpointError, DataError: The recipe, a checkpoint or the data are not valid.
    """

    def __init__(
        self,
        plan: TrainPlan,
        recipe: Recipe,
        dims: ParallelDims,
        folder: Path | None = None,
        *,
        resume: bool = True,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.plan, self.dims, self.output = plan, dims, Path(plan.output)
        self.callbacks: list[Callback] = []
        self.store = RunStore(
            self.output / CHECKPOINTS, dims, plan.keep_checkpoints, partial(_tell_checkpoint, self.callbacks)
        )
        self.folder = None if folder is None else str(folder.resolve())
        self.document = {"plan": plan.document(), "model": recipe.resolved()}
        self.step = find_resume_step(self.store, self.output, self.document, resume=resume)
        self.trainable = build_trainable(plan, recipe, dims, folder)
        model = self.trainable.model
        self.streams = Streams(plan, model, self.trainable.num_image_tokens, dims, folder)
        self.num_steps = self.streams.num_steps
        self.optimizer = make_optimizer(self.trainable.parts, plan, hidden_matrices(model.llm))
        weights = {name: stream.weight for name, stream in plan.data.items()}
        self.train_step = TrainStep(self.trainable.module, self.optimizer, dims, weights, plan.max_grad_norm)
        self.meter = StepMeter(plan, model, dims)
        if self.step:
            saved = self.store.run(self.step)
            self.store.load(self.step, self.trainable.module, self.optimizer)
            self.streams.restore(saved["data"])
            self.meter.totals |= saved["totals"]
        self.evaluator = None
        if plan.evaluate is not None:
            self.evaluator = Evaluator(plan, plan.evaluate, self.trainable, dims, folder)
        self.profile = None
        if plan.profile is not None and dims.is_main:
            self.profile = StepProfile(self.output / PROFILE_FILE, *plan.profile)
        if plan.encoder_cache is not None:
            cache_encoders(model, Path(plan.encoder_cache))
        self.first_step = self.saved_step = self.step
        self.data_state = self.streams.state()
        if dims.is_main:
            boards: list[Callback] = [TensorBoard(self.output)] if plan.tensorboard else []
            if plan.wandb is not None:
                boards.append(WandB(self.output, plan.wandb, self.document))
            self.callbacks += [RunLog(self.output, self.step), *boards, LossPlot(self.output), *callbacks]

    def run(self, signals: Signals, should_stop: Callable[[], bool] | None = None) -> TrainResult:
        """Run the remaining steps.

        Args:
            signals: Stop signals.
            should_stop: Called after every step.
        """
        result: TrainResult | None = None
        try:
            result = self._run(signals, should_stop)
        finally:
            self.streams.close()
            if self.profile is not None:
                self.profile.close()
            for callback in self.callbacks:
                callback.on_end(result)
        return result

    def _run(self, signals: Signals, should_stop: Callable[[], bool] | None) -> TrainResult:
        stop = min(self.num_steps, self.plan.stop_after or self.num_steps)
        skipped = 0
        while self.step < stop and not self._is_asked_to_stop(signals, should_stop):
            self.data_state = self.streams.state()
            if self.profile is not None:
                self.profile.before(self.step + 1)
            started = time.perf_counter()
            try:
                record, data = self._do_step()
                skipped = skipped + 1 if "skipped" in record else 0
                if skipped > MAX_SKIPPED:
                    raise TrainingError(f"{skipped} steps in a row updated nothing; the last: {record['skipped']}")
            except SphinxkitError as error:
                self.train_step.clear()
                raise type(error)(f"step {self.step + 1}: {error}\n{self._rescue()}") from error
            is_skipped = "skipped" in record
            record |= self.meter.measure(data, time.perf_counter() - started, is_skipped=is_skipped)
            self._tell_step(record)
            self.step += 1
            self.data_state = self.streams.state()
            if self.profile is not None:
                self.profile.after(self.step)
            self._evaluate()
            self.store.poll()
            if self.plan.save_every and self.step % self.plan.save_every == 0 and self.step < stop:
                self._save(wait=not self.plan.async_save)
        self._save(wait=True)
        if self.step == self.num_steps:
            return TrainResult("done", self.step, self.num_steps, self.output, self._export())
        received = next((number for number in self.dims.gather(signals.received) if number is not None), None)
        if self.step >= stop or received is None:
            return TrainResult("paused", self.step, self.num_steps, self.output)
        return TrainResult("interrupted", self.step, self.num_steps, self.output, signal=received)

    def _evaluate(self) -> None:
        every = self.plan.evaluate_every
        if self.evaluator is not None and every and (self.step % every == 0 or self.step == self.num_steps):
            record = self.evaluator(self.step)
            for callback in self.callbacks:
                callback.on_evaluation(record)

    def _is_asked_to_stop(self, signals: Signals, should_stop: Callable[[], bool] | None) -> bool:
        asked = should_stop is not None and self.step > self.first_step and should_stop()
        return self.dims.any(asked or signals.received is not None)

    def _do_step(self) -> tuple[dict[str, Any], StepData]:
        """Run one step; returns the log entry of its losses (with ``skipped`` if nothing was updated) and its data."""
        started = time.perf_counter()
        torch.manual_seed(derive_key(self.plan.seed, self.step, self.dims.dp_rank))
        with self.dims.shared_errors():
            data = self.streams.read()
        waited = time.perf_counter() - started
        plan = self.plan
        rate = learning_rate(self.step, self.num_steps, plan.lr, warmup_ratio=plan.warmup_ratio, minimum=plan.min_lr)
        record: dict[str, Any] = {"step": self.step, "lr": rate, "data_seconds": waited}
        try:
            losses = self.train_step.backward(data.batches)
            if losses.loss is None:
                self.train_step.clear()
                return record | {"skipped": "no sample of this step has a token to learn"}, data
            norm = self.train_step.update(rate)
            record |= {"loss": losses.loss, "losses": losses.streams, "learnt": losses.num_learnt, "grad_norm": norm}
            if losses.balance is not None:
                weighted = self.trainable.model.load_balancing_weight * losses.balance
                record |= {"cross_entropy": losses.loss - weighted, "load_balancing": losses.balance}
        except NonFiniteError as error:
            if plan.on_nonfinite == "stop":
                raise
            self.train_step.clear()
            record["skipped"] = str(error)
        return record, data

    def _tell_step(self, record: dict[str, Any]) -> None:
        done = self.step + 1
        is_due = done % self.plan.log_every == 0 or done == self.num_steps or "skipped" in record or "bad" in record
        if is_due:
            left = (self.num_steps - done) * self.meter.totals["seconds"] / done
            for callback in self.callbacks:
                callback.on_step(record | {"num_steps": self.num_steps, "seconds_left": left})

    def _rescue(self) -> str:
        """Save the state from before the failed step; returns a message about the outcome."""
        try:
            self._save(wait=True)
        except TrainingError as error:
            return f"the state before this step could not be saved, either: {error}"
        return f"the state before this step was saved: {self.store.path(self.step)}"

    def _save(self, *, wait: bool) -> None:
        if self.saved_step == self.step and (self.step or not wait):
            self.store.finish()
            return
        run = self.document | {
            "step": self.step,
            "num_steps": self.num_steps,
            "data": self.data_state,
            "totals": self.meter.totals,
            "processes": {"dp": self.dims.dp_size, "tp": self.dims.tp_size},
            "folder": self.folder,  # of the plan's relative paths
            "versions": {"sphinxkit": __version__, "torch": torch.__version__},
        }
        self.store.save(self.step, self.trainable.module, self.optimizer, run, wait=wait)
        self.saved_step = self.step

    def _export(self) -> Path | None:
        if not self.plan.export:
            return None
        path = self.output / "model"
        export(path, self.trainable.module, self.plan, self.dims, DTYPES[self.plan.dtype], self.output / "adapter")
        return path


def _tell_checkpoint(callbacks: Sequence[Callback], step: int, folder: Path) -> None:
    for callback in callbacks:
        callback.on_checkpoint(step, folder)
