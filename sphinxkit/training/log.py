"""Logs of a run: JSON lines per step, optional TensorBoard files, a loss plot at the end."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from sphinxkit.atomic import atomic_file
from sphinxkit.training.callbacks import Callback, TrainResult, flat_numbers
from sphinxkit.training.errors import TrainingError, named_errors
from sphinxkit.training.log_records import EVALUATIONS_FILE, LOG_FILE, read_log

PLOT_FILE = "loss.png"


class RunLog(Callback):
    """The log of one run: one JSON line for each logged step and each evaluation.

    Args:
        folder: Run folder.
        first_step: Records of later steps are dropped, because a resumed run repeats these steps.
    Raises:
        TrainingError: The disk is full or fails.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self._steps = _reopened(folder, LOG_FILE, first_step - 1)  # steps are counted from 0
        self._evaluations = _reopened(folder, EVALUATIONS_FILE, first_step)

    def on_step(self, record: Mapping[str, Any]) -> None:
        """Append a record and flush it.

        Args:
            record: Plain data with ``step``.
        Raises:
            TrainingError: The disk is full or fails.
        """
        _append(self._steps, record)

    def on_evaluation(self, record: Mapping[str, Any]) -> None:
        """Append a record and flush it; TrainingError if the disk fails."""
        _append(self._evaluations, record)

    def on_end(self, result: TrainResult | None = None) -> None:
        """Close the files."""
        for file in (self._steps, self._evaluations):
            with contextlib.suppress(OSError):  # ``_append`` has raised what could not be written
                file.close()


def _reopened(folder: Path, name: str, last_step: int) -> TextIO:
    path = folder / name
    with named_errors(path):
        kept = [record for record in read_log(folder, name) if record["step"] <= last_step]
        with atomic_file(path) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        return path.open("a", encoding="utf-8")


def _append(file: TextIO, record: Mapping[str, Any]) -> None:
    with named_errors(file.name):
        file.write(json.dumps(record) + "\n")
        file.flush()


class TensorBoard(Callback):
    """TensorBoard files with every number of the log.

    Args:
        folder: Run folder; the files are below ``tensorboard``.
    Raises:
        TrainingError: TensorBoard is not installed, or the disk is full or fails.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise TrainingError(
                "tensorboard: true, but it is not installed: pip install tensorboard, or set tensorboard: false (the "
                "JSONL log is always written)"
            ) from error
        with named_errors(folder / "tensorboard"):
            self._board: Any = SummaryWriter(folder / "tensorboard")

    def on_step(self, record: Mapping[str, Any]) -> None:
        """Add every number of a record."""
        for name, number in flat_numbers(record).items():
            if name not in ("step", "num_steps"):
                self._board.add_scalar(name, number, record["step"])

    def on_evaluation(self, record: Mapping[str, Any]) -> None:
        """Add every number below ``evaluation``."""
        for name, number in flat_numbers(record, "evaluation/").items():
            if name != "evaluation/step":
                self._board.add_scalar(name, number, record["step"])

    def on_end(self, result: TrainResult | None) -> None:
        """Close the files."""
        self._board.close()


class WandB(Callback):
    """Logs to Weights & Biases; with ``WANDB_MODE=offline`` to files below the run folder, for ``wandb sync``.

    Args:
        folder: Run folder; a resumed run goes on in the same run of theirs.
        project: Their project.
        document: Shown as the run's configuration.
    Raises:
        TrainingError: wandb is not installed, or the disk is full or fails.
    """

    def __init__(self, folder: Path, project: str, document: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise TrainingError(
                f'wandb: {project}, but it is not installed: pip install "sphinxkit[wandb]", or leave the key out'
            ) from error
        name = folder / "wandb-id"
        with named_errors(name):
            if not name.exists():
                with atomic_file(name) as temporary:
                    temporary.write_text(secrets.token_hex(4), encoding="utf-8")
        self._run: Any = wandb.init(
            project=project,
            name=folder.name,
            id=name.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(folder),
            config=dict(document),
        )

    def on_step(self, record: Mapping[str, Any]) -> None:
        """Log every number of a record."""
        self._run.log(flat_numbers(record), step=record["step"] + 1)

    def on_evaluation(self, record: Mapping[str, Any]) -> None:
        """Log every number below ``evaluation``."""
        self._run.log(flat_numbers(record, "evaluation/"), step=record["step"])

    def on_end(self, result: TrainResult | None) -> None:
        """Finish their run."""
        self._run.finish(exit_code=0 if result is not None else 1)


class LossPlot(Callback):
    """Draws the loss plot at the end of the run.

    Args:
        folder: Run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_end(self, result: TrainResult | None) -> None:
        """Draw it if matplotlib is there."""
        if result is not None and result.status == "done":
            plot_losses(self._folder)


def plot_losses(folder: Path) -> Path | None:
    """Plot the total loss, the loss of each stream, and the learning rate below.

    Args:
        folder: Run folder.
    Returns:
        The picture's path; None without matplotlib (the extra ``plot``) or without records.
    Raises:
        TrainingError: The disk is full or fails.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    records = [record for record in read_log(folder) if record.get("loss") is not None]
    if not records:
        return None
    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    steps = [record["step"] for record in records]
    losses.plot(steps, [record["loss"] for record in records], label="all", color="black", linewidth=1)
    for name in sorted({name for record in records for name in record["losses"]}):
        points = [(record["step"], record["losses"][name]) for record in records if name in record["losses"]]
        losses.plot(*zip(*points, strict=True), label=name, linewidth=1, alpha=0.7)
    losses.set_ylabel("loss per token (nats)")
    losses.legend()
    rates.plot(steps, [record["lr"] for record in records], color="grey")
    rates.set_ylabel("learning rate")
    rates.set_xlabel("step")
    path = folder / PLOT_FILE
    with named_errors(path), atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path
