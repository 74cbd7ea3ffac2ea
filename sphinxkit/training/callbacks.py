"""What a run tells, and to whom: its result, and the calls that loggers, evaluators and reports receive."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

# What a run's totals count that should not happen, and the words of the progress line
_TROUBLES = {"bad": "bad samples", "too_long": "too long", "truncated": "cut to fit", "skipped_steps": "steps skipped"}


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a run ended.

    Args:
        status: ``done``; ``paused`` at ``stop_after`` or because ``should_stop`` said so; ``interrupted`` by a signal.
        step: Steps that have been done.
        num_steps: Of the whole run.
        folder: Of the run.
        model: Folder of the exported model, if it was written.
        signal: That interrupted the run.
    """

    status: Literal["done", "paused", "interrupted"]
    step: int
    num_steps: int
    folder: Path
    model: Path | None = None
    signal: int | None = None


class Callback:
    """What a run calls, in its first process only. Subclasses override what they need.

    An error that a callback raises ends the run.
    """

    def on_step(self, record: Mapping[str, Any]) -> None:
        """Called after every step that is logged.

        Args:
            record: What the log says of the step, with ``num_steps`` and ``seconds_left``.
        """

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """Called when a checkpoint is complete.

        Args:
            step: Steps that it holds.
            folder: Of the checkpoint.
        """

    def on_end(self, result: TrainResult | None) -> None:
        """Called once at the end.

        Args:
            result: None: an error ends the run.
        """


class ProgressReport(Callback):
    """One line of text per logged step, and one for the result.

    Args:
        stream: Where the lines go; None: standard error.
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

    def on_end(self, result: TrainResult | None) -> None:
        """Write how the run ended."""
        if result is not None:
            self._write(f"{result.status} at step {result.step} of {result.num_steps}: {result.folder}")


def progress_line(record: Mapping[str, Any]) -> str:
    """One line about a step.

    Args:
        record: As ``Callback.on_step`` receives it.
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
