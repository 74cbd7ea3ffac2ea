from __future__ import annotations

from sphinxkit.formatters import tasks
from tests.formatters.tasks.faults import faults


def test_empty_words() -> None:
    result = tasks.create("vqa").parse("  ")
    assert (result.items, faults(result)) == ((), ["empty!"])
