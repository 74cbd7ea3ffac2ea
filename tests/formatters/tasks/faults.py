from __future__ import annotations

from typing import Any

from sphinxkit.formatters import tasks
from sphinxkit.formatters.tasks import ERROR_KINDS
from sphinxkit.geometry import Box, ImageGeometry

SQUARE = ImageGeometry(1000, 1000)


WIDE = ImageGeometry(1000, 500)  # 250 rows of padding above and below


GOOD = Box(100.0, 200.0, 300.0, 400.0)


def faults(result: tasks.ParseResult[Any]) -> list[str]:
    """Kinds of the faults, failures with a "!"."""
    assert {error.kind for error in result.errors} <= set(ERROR_KINDS)
    return [error.kind + ("" if error.is_repaired else "!") for error in result.errors]
