"""Whether a run can be resumed, and from which step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sphinxkit.errors import RecipeError
from sphinxkit.recipe import Recipe
from sphinxkit.training.errors import TrainingError
from sphinxkit.training.plan_keys import changed_keys, translate_saved
from sphinxkit.training.state import RunStore


def find_resume_step(store: RunStore, output: Path, document: Mapping[str, Any], *, resume: bool) -> int:
    """The step from which a run resumes; 0: start a new run.

    Args:
        store: The run's checkpoints.
        output: Folder of the run, for messages.
        document: ``plan`` and ``model`` of the current run.
        resume: Whether resuming is allowed.
    Raises:
        TrainingError: There is a previous run and resuming is not allowed, or its plan or model differs.
    """
    steps = store.steps()
    if not steps:
        return 0
    if not resume:
        raise TrainingError(f"{output} holds a run at step {steps[-1]}: resume it, or name another output folder")
    saved, current = store.run(steps[-1]), json.loads(json.dumps(document))
    changes = changed_keys(translate_saved(saved["plan"]), current["plan"])
    changes += [f"model: {line}" for line in changed_keys(_with_defaults(saved["model"]), current["model"], " ")]
    if changes:
        lines = "".join(f"\n  {line}" for line in changes)
        raise TrainingError(
            f"{output} cannot be resumed from step {steps[-1]}: the recipe differs from the saved one:{lines}"
        )
    return steps[-1]


def _with_defaults(model: Mapping[str, Any]) -> Mapping[str, Any]:
    """A saved model recipe with the options that components have got since; one that is not valid stays as it is."""
    try:
        found: Mapping[str, Any] = json.loads(json.dumps(Recipe(model, trusted=False).resolved()))
        return found
    except RecipeError:
        return model
