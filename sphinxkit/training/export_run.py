"""``sphinxkit.export``: the model of a run's checkpoint, at any time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from sphinxkit.errors import CheckpointError
from sphinxkit.recipe import Recipe
from sphinxkit.training.errors import TrainingError
from sphinxkit.training.export import export as write_model
from sphinxkit.training.overrides import read_plan
from sphinxkit.training.parallel import DTYPES, ParallelDims
from sphinxkit.training.plan_keys import translate_saved
from sphinxkit.training.state import CHECKPOINTS, load_weights, read_run, saved_steps, step_folder
from sphinxkit.training.trainable_model import build_trainable, find_recipe


def export(
    run: str | Path, output: str | Path | None = None, *, step: int | None = None, overwrite: bool = False
) -> Path:
    """Write the model of a run's checkpoint for ``sphinxkit.load``; the run may be running.

    What the run trains comes from its checkpoint, the rest from the plan's ``init_from``. The model is built on the
    CPU in float32 and written in the plan's dtype, as at the end of the run.

    Args:
        run: Folder of the run.
        output: Folder to write; None: ``model-step-N`` in the run's folder. A LoRA run also writes ``OUTPUT-adapter``.
        step: Step of the checkpoint; None: the newest.
        overwrite: Replace an existing folder.
    Returns:
        The folder.
    Raises:
        TrainingError: No such checkpoint, or it cannot be read.
        CheckpointError: The target exists, or the plan's sources cannot be read.
    """
    folder = Path(run) / CHECKPOINTS
    steps = saved_steps(folder)
    if not steps or (step is not None and step not in steps):
        held = f"it holds {', '.join(map(str, steps))}" if steps else "it holds none yet"
        raise TrainingError(f"{run}: no checkpoint{'' if step is None else f' of step {step}'}; {held}")
    step = steps[-1] if step is None else step
    target = Path(run) / f"model-step-{step:08d}" if output is None else Path(output)
    if target.exists() and not overwrite:
        raise CheckpointError(f"{target} exists; pass overwrite=True to replace it")
    saved = read_run(step_folder(folder, step))
    plan, _ = read_plan(translate_saved(saved["plan"]))
    plan = replace(plan, device="cpu", tensor_parallel=1, dp_replicate=1, dp_shard=None, encoder_cache=None)
    base = None if saved.get("folder") is None else Path(saved["folder"])
    dims = ParallelDims(0, 1, torch.device("cpu"))
    source = None if saved["model"].get("tokenizer") is None else find_recipe(plan, base).source  # it lies beside that
    trainable = build_trainable(plan, Recipe(saved["model"], source, trusted=False), dims, base)
    load_weights(step_folder(folder, step), trainable.module, dims)
    write_model(
        target, trainable.module, plan, dims, DTYPES[plan.dtype], adapter=target.with_name(f"{target.name}-adapter")
    )
    return target
