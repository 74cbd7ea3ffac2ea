"""Result of a metric."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sphinxkit.evaluation.annotation import Record


@dataclass(frozen=True, slots=True)
class MetricResult:
    """Result of one metric over a set of records.

    Args:
        scores: Scores by name; numbers, or one level of numbers by label.
        unparsable: Number of answers that the strict rules could not parse.
        lenient: Scores with the tolerant parser, if defined.
        notes: Remarks on the numbers (a policy, a missing category).
        unread: Number of answers that the tolerant parser could not read, either; None: as ``unparsable``.
    """

    scores: dict[str, Any]
    unparsable: int = 0
    lenient: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unread: int | None = None


Metric = Callable[[Sequence[Record]], MetricResult]
