"""Common parts of stages and ablations: time limit, recipes, training run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sphinxkit.recipe import Recipe, shipped_folder
from sphinxkit.training import Callback, TrainPlan, train

Report = Callable[[str, Mapping[str, Any]], None]
"""Called with the name of a stage or variant, and a record of its log."""

RECIPES_OUTPUT = "runs/nano"
"""Where the recipes of ``recipes/nano`` put their runs; replaced by the folder that the user asks for."""


@dataclass
class TimeLimit:
    """How long a call may work.

    Args:
        minutes: Minutes from now on; None: no limit.
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


def training_plan(name: str, output: str | Path) -> TrainPlan:
    """The plan of a training stage, with its folders below ``output``.

    Args:
        name: A recipe of ``recipes/nano``.
        output: Folder of all stages.
    """
    document = dict(Recipe.from_yaml(recipes() / f"{name}.yaml").document)
    del document["kind"]
    for key in ("init_from", "output"):
        document[key] = str(document[key]).replace(RECIPES_OUTPUT, str(output), 1)
    return TrainPlan(**document)


class _Report(Callback):
    def __init__(self, report: Callable[[Mapping[str, Any]], None]) -> None:
        self._report = report

    def on_step(self, record: Mapping[str, Any]) -> None:
        """Pass the record on."""
        self._report(record)


def train_until(plan: TrainPlan, limit: TimeLimit, report: Callable[[Mapping[str, Any]], None]) -> bool:
    """Train until the run is done or the time is over; the next call resumes it.

    Args:
        plan: The run; its paths may be relative to SPHINX-nano's recipes.
        limit: Time limit of the call.
        report: Called with each record of the log.
    Returns:
        Whether the run is done.
    """
    recipe = Recipe(plan.document(), recipes() / "train.yaml")  # whose folder the paths are relative to
    return train(recipe, should_stop=lambda: limit.is_over, callbacks=[_Report(report)]).status == "done"
