"""Stop signals, handled at the end of the step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Signals:
    """Remembers SIGTERM and SIGINT until the end of the step; a second signal acts at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, self._previous[number])

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
