"""Evaluation of a running stage: losses of held-out streams, and benchmarks."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sphinxkit.data.collate import Batch
from sphinxkit.evaluation.run import evaluate
from sphinxkit.recipe.io import load
from sphinxkit.training.export import export
from sphinxkit.training.parallel import DTYPES, ParallelDims
from sphinxkit.training.plan import EvaluationPlan, TrainPlan
from sphinxkit.training.step import idle_batch
from sphinxkit.training.streams import Streams
from sphinxkit.training.trainable_model import TrainableModel


class Evaluator:
    """Evaluates the model of a run; every process calls it.

    Args:
        plan: The training plan.
        what: Its ``evaluate``.
        trainable: The model.
        dims: Process layout.
        folder: Base folder of the plan's relative paths.
    Raises:
        RecipeError: A mixture is not valid.
        DataError: A mixture cannot be read.
    """

    def __init__(
        self, plan: TrainPlan, what: EvaluationPlan, trainable: TrainableModel, dims: ParallelDims, folder: Path | None
    ) -> None:
        self.plan, self.what, self.trainable, self.dims = plan, what, trainable, dims
        self.streams = None
        if what.data:
            # epochs and steps are the training's; workers would outlive an evaluation
            held_out = replace(plan, data=what.data, num_workers=0)
            self.streams = Streams(held_out, trainable.model, trainable.num_image_tokens, dims, folder)
            self._start = self.streams.state()

    def __call__(self, step: int) -> dict[str, Any]:
        """Losses and benchmark scores after a step.

        Args:
            step: Number of finished steps.
        Returns:
            ``losses``: mean loss per token by stream; ``benchmarks``: scores by name.
        Raises:
            DataError: Held-out data or annotations cannot be read.
        """
        found: dict[str, Any] = {"step": step, "losses": self._losses()}
        if self.what.benchmarks:
            found["benchmarks"] = self._benchmarks(step)
        return found

    @torch.no_grad()
    def _losses(self) -> dict[str, float]:
        if self.streams is None:
            return {}
        module, names = self.trainable.module, list(self.what.data)
        sums = torch.zeros(len(names), 2, dtype=torch.float64, device=self.dims.device)
        self.streams.restore(self._start)
        was_training = {part for part in module.modules() if part.training}
        module.eval()
        try:
            mixtures = self.streams.mixtures.values()
            for _ in range(min(self.what.num_batches, *(mixture.num_batches for mixture in mixtures))):
                with self.dims.shared_errors():
                    data = self.streams.read()
                for index, name in enumerate(names):
                    own: list[Batch] = data.batches.get(name, [])
                    passes = torch.tensor(len(own), device=self.dims.device)
                    for number in range(int(self.dims.reduce(passes, dist.ReduceOp.MAX))):
                        batch = own[number] if number < len(own) else idle_batch(self.dims.device)
                        sums[index, 0] += module(batch.to(self.dims.device))[0].double()
                        sums[index, 1] += batch.num_learnt
        finally:
            for part in was_training:
                part.training = True
            self.streams.close()
        totals = self.dims.reduce(sums).tolist()
        return {name: total / count for name, (total, count) in zip(names, totals, strict=True) if count}

    def _benchmarks(self, step: int) -> dict[str, Any]:
        """The first process answers with a copy of the model, as a user would have it; the others wait."""
        folder = Path(self.plan.output) / "evaluation"
        dtype = DTYPES[self.plan.dtype]
        if self.dims.is_main:  # a run that was killed may have left half of each
            for left in ("model", "adapter", f"step-{step:08d}"):
                shutil.rmtree(folder / left, ignore_errors=True)
        export(folder / "model", self.trainable.module, self.plan, self.dims, dtype, folder / "adapter")
        scores: dict[str, Any] = {}
        with self.dims.shared_errors():
            if not self.dims.is_main:
                return scores
            try:
                model = load(folder / "model", device=self.dims.device, dtype=dtype)
                for name, each in self.what.benchmarks.items():
                    report = evaluate(
                        model,
                        each.benchmark,
                        each.annotations,
                        each.images,
                        folder / f"step-{step:08d}" / f"{name}.jsonl",
                        batch_size=each.batch_size,
                    )
                    scores[name] = report.scores
            finally:
                for copied in ("model", "adapter"):
                    shutil.rmtree(folder / copied, ignore_errors=True)
        return scores
