from __future__ import annotations

import signal
import threading

import pytest

from sphinxkit.training import signals as module
from sphinxkit.training.signals import Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_remembered_and_its_copies_are_one(number: int) -> None:
    """A batch system signals every process of a run, and torchrun passes on what it got itself."""
    before = signal.getsignal(number)
    with Signals().caught() as found:
        assert found.received is None
        signal.raise_signal(number)
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)
        assert found.received == number
    assert signal.getsignal(number) is before


def test_a_later_one_acts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE_SECONDS", -1.0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    try:
        with Signals().caught() as found:
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            assert found.received == signal.SIGINT
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_catch_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def watch() -> None:
        with Signals().caught() as found:
            seen.append((found.received, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert seen == [(None, before)]
