"""Callbacks of a run, and its result."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from sphinxkit.training.log_records import read_log

# What a run's totals count that should not happen, and the words of the progress line
_TROUBLES = {"bad": "bad samples", "too_long": "too long", "truncated": "cut to fit", "skipped_steps": "steps skipped"}


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a run ended.

    Args:
        status: ``done``; ``paused`` by ``stop_after`` or ``should_stop``; ``interrupted`` by a signal.
        step: Number of finished steps.
        num_steps: Number of steps of the whole run.
        folder: Run folder.
        model: Folder of the exported model, if any.
        signal: Signal that interrupted the run.
    """

    status: Literal["done", "paused", "interrupted"]
    step: int
    num_steps: int
    folder: Path
    model: Path | None = None
    signal: int | None = None

    @property
    def losses(self) -> list[float]:
        """The loss of every step that the run's log holds, in order; resumed runs included."""
        return [float(record["loss"]) for record in read_log(self.folder) if record.get("loss") is not None]


class Callback:
    """Base class of callbacks. A run calls them in its first process only; subclasses override what they need.

    An error that a callback raises ends the run.
    """

    def on_step(self, record: Mapping[str, Any]) -> None:
        """Called after every step that is logged.

        Args:
            record: The step's log record, plus ``num_steps`` and ``seconds_left``.
        """

    def on_evaluation(self, record: Mapping[str, Any]) -> None:
        """Called after every evaluation.

        Args:
            record: ``step`` (number of finished steps), ``losses`` by stream, and ``benchmarks``: scores by name.
        """

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """Called when a checkpoint is complete.

        Args:
            step: Number of finished steps.
            folder: Checkpoint folder.
        """

    def on_end(self, result: TrainResult | None) -> None:
        """Called once at the end.

        Args:
            result: The run's result; None after an error.
        """


class ProgressReport(Callback):
    """Writes one line of text per logged step, and one for the result.

    Args:
        stream: Output stream; None: standard error.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    def _write(self, line: str) -> None:
        stream = sys.stderr if self._stream is None else self._stream
        stream.write(line + "\n")
        stream.flush()

    def on_step(self, record: Mapping[str, Any]) -> None:
        """Write the step's line."""
        self._write(progress_line(record))

    def on_evaluation(self, record: Mapping[str, Any]) -> None:
        """Write the evaluation's line."""
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in flat_numbers(record).items() if name != "step")
        self._write(f"evaluation after step {record['step']}  {numbers}")

    def on_end(self, result: TrainResult | None) -> None:
        """Write how the run ended."""
        if result is not None:
            self._write(f"{result.status} at step {result.step} of {result.num_steps}: {result.folder}")


def flat_numbers(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Every number of a record, nested ones as ``outer/inner``.

    Args:
        record: Plain data.
        prefix: Before every name.
    """
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            found |= flat_numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{key}"] = value
    return found


def progress_line(record: Mapping[str, Any]) -> str:
    """Format one line about a step.

    Args:
        record: See ``Callback.on_step``.
    """
    place = f"step {record['step'] + 1}/{record['num_steps']}"
    if "skipped" in record:
        return f"{place}  skipped: {record['skipped']}"
    losses = record["losses"]
    parts = f" ({', '.join(f'{name} {loss:.4f}' for name, loss in losses.items())})" if len(losses) > 1 else ""
    used = "" if record["mfu"] is None else f"  MFU {record['mfu']:.1%}"
    total = record["total"]
    troubles = [f"{total[key]:,.0f} {words}" for key, words in _TROUBLES.items() if total.get(key)]
    so_far = f"  so far {', '.join(troubles)}" if troubles else ""
    return (
        f"{place}  loss {record['loss']:.4f}{parts}  norm {record['grad_norm']:.3f}  lr {record['lr']:.2e}  "
        f"{record['samples'] / record['seconds']:.1f} samples/s  {record['tokens_per_second']:,.0f} tokens/s"
        f"{used}{so_far}  {duration(record['seconds_left'])} left"
    )


def duration(seconds: float) -> str:
    """``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
