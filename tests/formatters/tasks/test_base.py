from __future__ import annotations

from sphinxkit.formatters import tasks
from sphinxkit.formatters.tasks.base import MAX_QUOTE
from tests.formatters.tasks.faults import SQUARE


def test_an_error_says_where_and_quotes() -> None:
    result = tasks.create("rec").parse("at [0.1,0.2,0.3," + "x" * 200 + "]", SQUARE)
    error = result.failures[0]
    assert (error.kind, error.position) == ("not_a_number", 4)
    assert error.text == ("0.1,0.2,0.3," + "x" * 200)[:MAX_QUOTE]
