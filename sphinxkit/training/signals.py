"""Stop signals, handled at the end of the step."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

GRACE_SECONDS = 10.0
"""Copies within this time count as one signal: batch systems and torchrun send it to every process. Our choice."""


class Signals:
    """Remembers the first SIGTERM or SIGINT until the end of the step; one after ``GRACE_SECONDS`` acts at once.

    Attributes:
        received: Number of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > GRACE_SECONDS:
            signal.signal(number, self._previous[number])
            signal.raise_signal(number)

    @contextmanager
    def caught(self) -> Iterator[Signals]:
        """Catch signals inside the ``with`` block; does nothing outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        for number in (int(signal.SIGTERM), int(signal.SIGINT)):
            self._previous[number] = signal.signal(number, self._handle)
        try:
            yield self
        finally:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
