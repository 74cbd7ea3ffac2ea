"""Logs of a run: JSON lines per step, optional TensorBoard files, a loss plot at the end."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sphinxkit.atomic import atomic_file
from sphinxkit.training.callbacks import Callback, TrainResult
from sphinxkit.training.errors import TrainingError

LOG_FILE = "log.jsonl"
PLOT_FILE = "loss.png"


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Read the log records of a run, oldest first; an incomplete last line (of a killed run) is ignored.

    Args:
        folder: Run folder.
    """
    path = folder / LOG_FILE
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records


class RunLog(Callback):
    """The log of one run: one JSON line for each logged step.

    Args:
        folder: Run folder.
        first_step: Records from this step on are dropped, because a resumed run repeats these steps.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_log(folder) if record["step"] < first_step]
        with atomic_file(folder / LOG_FILE) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        self._file = (folder / LOG_FILE).open("a", encoding="utf-8")

    def on_step(self, record: Mapping[str, Any]) -> None:
        """Append a record and flush it.

        Args:
            record: Plain data with ``step``.
        Raises:
            TrainingError: The disk is full or fails.
        """
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise TrainingError(f"{self._file.name} cannot be written: {error}") from error

    def on_end(self, result: TrainResult | None = None) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # ``on_step`` has raised what could not be written
            self._file.close()


class TensorBoard(Callback):
    """TensorBoard files with every number of the log.

    Args:
        folder: Run folder; the files are below ``tensorboard``.
    Raises:
        TrainingError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise TrainingError(
                "tensorboard: true, but it is not installed: pip install tensorboard, or set tensorboard: false (the "
                "JSONL log is always written)"
            ) from error
        self._board: Any = SummaryWriter(folder / "tensorboard")

    def on_step(self, record: Mapping[str, Any]) -> None:
        """Add every number of a record."""
        for key, value in record.items():
            nested = isinstance(value, Mapping)
            values = {f"{key}/{name}": entry for name, entry in value.items()} if nested else {key: value}
            for name, number in values.items():
                if isinstance(number, int | float) and name not in ("step", "num_steps"):
                    self._board.add_scalar(name, number, record["step"])

    def on_end(self, result: TrainResult | None) -> None:
        """Close the files."""
        self._board.close()


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
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path
