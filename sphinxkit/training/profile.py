"""torch's profile of some steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

PROFILE_FILE = "profile.json"


class StepProfile:
    """Profiles steps ``first`` to ``last`` and writes a trace for chrome://tracing or Perfetto.

    Args:
        path: File to write.
        first: First step, counted from 1.
        last: Last step.
    """

    def __init__(self, path: Path, first: int, last: int) -> None:
        self.path, self.first, self.last = path, first, last
        self._profiler: Any = None

    def before(self, step: int) -> None:
        """Start with the first step.

        Args:
            step: The step about to run, counted from 1.
        """
        if self._profiler is None and self.first <= step <= self.last:
            from torch.profiler import ProfilerActivity, profile

            on_gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profiler = profile(activities=[ProfilerActivity.CPU, *on_gpu], acc_events=True)
            self._profiler.start()

    def after(self, step: int) -> None:
        """Write the trace after the last step.

        Args:
            step: The step that ran, counted from 1.
        """
        if self._profiler is not None and step >= self.last:
            self.close()

    def close(self) -> None:
        """Write what was profiled, if anything; called at the end of the run, too."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler.export_chrome_trace(str(self.path))
            self._profiler = None
            self.first = self.last + 1
