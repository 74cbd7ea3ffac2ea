"""A run from start, or from where it stopped, to its end."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from sphinxkit.data.permutation import derive_key
from sphinxkit.errors import SphinxkitError
from sphinxkit.recipe import build
from sphinxkit.training.assembly import Assembly, assemble, find_recipe
from sphinxkit.training.encoder_cache import cache_encoders
from sphinxkit.training.errors import TrainingError
from sphinxkit.training.flops import llm_flops, peak_flops, utilization, vision_flops
from sphinxkit.training.log import RunLog, plot_losses
from sphinxkit.training.optim import hidden_matrices, learning_rate, make_optimizer
from sphinxkit.training.parallel import DTYPES, World, open_world
from sphinxkit.training.plan import TrainPlan, changed_keys
from sphinxkit.training.signals import Signals
from sphinxkit.training.state import RunStore, export
from sphinxkit.training.step import NonFiniteError, TrainStep
from sphinxkit.training.streams import StepData, Streams
from sphinxkit.version import __version__

MAX_SKIPPED = 10  # steps in a row without a finite loss before a run that skips them stops; our choice
Report = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a run ended.

    Args:
        status: ``done``; ``paused`` at ``stop_after``; ``interrupted`` by a signal.
        step: Steps that have been done.
        num_steps: Of the whole run.
        folder: Of the run.
        model: Folder of the exported model, if it was written.
        plot: The loss curves, if they were drawn.
        signal: That interrupted the run.
    """

    status: Literal["done", "paused", "interrupted"]
    step: int
    num_steps: int
    folder: Path
    model: Path | None = None
    plot: Path | None = None
    signal: int | None = None


def train(
    plan: TrainPlan, *, folder: Path | None = None, resume: bool = True, report: Report | None = None
) -> TrainResult:
    """Train as the plan says; go on where a former run in the same folder stopped.

    Every process that torchrun started calls this. The log is ``log.jsonl``, checkpoints are below ``checkpoints/``,
    the model that ``sphinxkit.load`` reads is ``model/``, the losses' plot ``loss.png``.

    Args:
        plan: What to do.
        folder: That relative paths of the plan may be relative to, apart from ``output``.
        resume: Whether a former run in the output folder is gone on with; else it is an error.
        report: Called in the first process with every record of the log, with what is known of the time left.
    Raises:
        TrainingError: The run cannot start, be resumed or go on.
        RecipeError, CheckpointError, DataError: As the parts it is made of.
    """
    shape = build(find_recipe(plan, folder), device="meta").llm
    with open_world(plan, shape.num_heads, shape.num_kv_heads) as world, Signals().caught() as signals:
        return _Run(plan, world, folder, resume, report, signals).run()


class _Run:
    def __init__(
        self, plan: TrainPlan, world: World, folder: Path | None, resume: bool, report: Report | None, signals: Signals
    ) -> None:
        self.plan, self.world, self.report, self.signals = plan, world, report, signals
        self.output = Path(plan.output)
        self.store = RunStore(self.output / "checkpoints", world, plan.keep)
        self.document = {"plan": plan.document(), "model": find_recipe(plan, folder).resolved()}
        self.step = self._check_resume(resume)
        self.assembly: Assembly = assemble(plan, world, folder)
        self.streams = Streams(plan, self.assembly.model, self.assembly.num_image_tokens, world, folder)
        self.num_steps = self.streams.num_steps
        self.optimizer = make_optimizer(self.assembly.parts, plan, hidden_matrices(self.assembly.model.llm))
        weights = {name: stream.weight for name, stream in plan.data.items()}
        self.train_step = TrainStep(self.assembly.module, self.optimizer, world, weights, plan.clip)
        counted = ("samples", "tokens", "bad", "too_long", "truncated", "skipped_steps", "seconds")
        self.totals: dict[str, float] = dict.fromkeys(counted, 0.0)
        if self.step:
            self._restore()
        if plan.encoder_cache is not None:
            cache_encoders(self.assembly.model, Path(plan.encoder_cache))
        peak = plan.peak_flops or peak_flops(world.device, plan.dtype)
        self.peak = peak
        passes = 3 if "encoders" in plan.train else 1  # a backward pass is two: for inputs and for weights
        self.image_flops = passes * vision_flops(self.assembly.model) if peak is not None else 0.0
        self.log = RunLog(self.output, self.step, tensorboard=plan.tensorboard) if world.is_main else None
        self.saved_step = self.step
        self.data_state = self.streams.state()

    def _check_resume(self, resume: bool) -> int:
        steps = self.store.steps()
        if not steps:
            return 0
        if not resume:
            raise TrainingError(
                f"{self.output} holds a run that stands at step {steps[-1]}: resume it, or name another output folder"
            )
        saved = self.store.run(steps[-1])
        changes = changed_keys(saved["plan"], _plain(self.document["plan"]))
        changes += [f"model: {line}" for line in changed_keys(saved["model"], _plain(self.document["model"]), " ")]
        if changes:
            lines = "".join(f"\n  {line}" for line in changes)
            raise TrainingError(
                f"{self.output} cannot be resumed from step {steps[-1]}: the recipe differs from the saved one:{lines}"
            )
        return steps[-1]

    def _restore(self) -> None:
        saved = self.store.run(self.step)
        self.store.load(self.step, self.assembly.module, self.optimizer)
        self.streams.restore(saved["data"])
        self.totals |= saved["totals"]

    def run(self) -> TrainResult:
        """All steps that are left."""
        try:
            return self._run()
        finally:
            if self.log is not None:
                self.log.close()

    def _run(self) -> TrainResult:
        stop = min(self.num_steps, self.plan.stop_after or self.num_steps)
        skipped = 0
        while self.step < stop and not self._is_interrupted():
            self.data_state = self.streams.state()
            started = time.perf_counter()
            try:
                record, data = self._do_step()
                skipped = skipped + 1 if "skipped" in record else 0
                if skipped > MAX_SKIPPED:
                    raise TrainingError(f"{skipped} steps in a row without a finite loss")
            except SphinxkitError as error:
                self.train_step.clear()
                raise type(error)(f"step {self.step + 1}: {error}\n{self._rescue()}") from error
            self._finish_record(record, data, time.perf_counter() - started)
            self.step += 1
            self.data_state = self.streams.state()
            self.store.poll()
            if self.plan.save_every and self.step % self.plan.save_every == 0 and self.step < stop:
                self._save(wait=not self.plan.async_save)
        self._save(wait=True)
        if self.step < self.num_steps:
            status: Literal["paused", "interrupted"] = "paused" if self.step >= stop else "interrupted"
            return TrainResult(status, self.step, self.num_steps, self.output, signal=self.signals.received)
        model = self._export()
        plot = plot_losses(self.output) if self.world.is_main else None
        return TrainResult("done", self.step, self.num_steps, self.output, model, plot)

    def _rescue(self) -> str:
        """Save the state before the step that failed; says what came of it."""
        try:
            self._save(wait=True)
        except TrainingError as error:
            return f"the state before this step could not be saved, either: {error}"
        return f"the state before this step was saved: {self.store.path(self.step)}"

    def _is_interrupted(self) -> bool:
        return self.world.any(self.signals.received is not None)

    def _export(self) -> Path | None:
        if not self.plan.export:
            return None
        path = self.output / "model"
        export(path, self.assembly.module, self.plan, self.world, DTYPES[self.plan.dtype])
        return path

    def _save(self, *, wait: bool) -> None:
        if self.saved_step == self.step and (self.step or not wait):
            self.store.finish()
            return
        run = self.document | {
            "step": self.step,
            "num_steps": self.num_steps,
            "data": self.data_state,
            "totals": self.totals,
            "processes": {"dp": self.world.dp_size, "tp": self.world.tp_size},
            "versions": {"sphinxkit": __version__, "torch": torch.__version__},
        }
        self.store.save(self.step, self.assembly.module, self.optimizer, run, wait=wait)
        self.saved_step = self.step

    def _read(self) -> StepData:
        """This process's data; a fault in one process is raised in all, so that none waits for ever."""
        fault: SphinxkitError | None = None
        data = StepData({}, {}, [])
        try:
            data = self.streams.read()
        except SphinxkitError as error:
            fault = error
        if self.world.any(fault is not None):
            raise next(found for found in self.world.gather(fault) if found is not None)
        return data

    def _do_step(self) -> tuple[dict[str, Any], StepData]:
        """One step: what the log says of it, with ``skipped`` if its loss was not finite; and its data."""
        started = time.perf_counter()
        torch.manual_seed(derive_key(self.plan.seed, self.step, self.world.dp_rank))
        data = self._read()
        waited = time.perf_counter() - started
        rate = learning_rate(self.step, self.num_steps, self.plan.lr, warmup=self.plan.warmup, minimum=self.plan.min_lr)
        record: dict[str, Any] = {"step": self.step, "lr": rate, "data_seconds": waited}
        try:
            losses = self.train_step.backward(data.batches)
            norm = self.train_step.update(rate)
            record |= {"loss": losses.loss, "losses": losses.streams, "learnt": losses.num_learnt, "grad_norm": norm}
        except NonFiniteError as error:
            if self.plan.on_nonfinite == "stop":
                raise
            self.train_step.clear()
            self.totals["skipped_steps"] += 1
            record["skipped"] = str(error)
        return record, data

    def _finish_record(self, record: dict[str, Any], data: StepData, seconds: float) -> None:
        learnt = sum(batch.num_learnt for batches in data.batches.values() for batch in batches)
        images = sum(batch.num_images for batches in data.batches.values() for batch in batches)
        llm = self.assembly.model.llm
        flops = llm_flops(llm, data.lengths, learnt, is_trained="llm" in self.plan.train) + images * self.image_flops
        faults = [len(data.bad), len(data.skipped), len(data.truncated)]
        sums = [images, flops, len(data.lengths), sum(data.lengths), *faults]
        images, flops, samples, tokens, *faults = self.world.reduce(
            torch.tensor(sums, dtype=torch.float64, device=self.world.device)
        ).tolist()
        counted = {"samples": samples, "tokens": tokens, "seconds": seconds}
        counted |= zip(("bad", "too_long", "truncated"), faults, strict=True)
        for key, value in counted.items():
            self.totals[key] += value
        record |= {
            "data": hashlib.blake2b(repr(data.ids).encode(), digest_size=8).hexdigest(),
            "samples": int(samples),
            "images": int(images),
            "tokens": int(tokens),
            "too_long": int(counted["too_long"]),
            "truncated": int(counted["truncated"]),
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "mfu": utilization(flops, seconds, self.peak, self.world.size),
            "total": dict(self.totals),
        }
        if data.bad:
            record["bad"] = [{"id": sample.id, "reason": sample.reason} for sample in data.bad]
        done = self.step + 1
        is_due = done % self.plan.log_every == 0 or done == self.num_steps or "skipped" in record or "bad" in record
        if self.log is not None and is_due:
            self.log.write(record)
            if self.report is not None:
                left = (self.num_steps - done) * self.totals["seconds"] / done
                self.report(record | {"num_steps": self.num_steps, "seconds_left": left})


def _plain(value: Any) -> Any:
    """As JSON would give it back."""
    import json

    return json.loads(json.dumps(value))
