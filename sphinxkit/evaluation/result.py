"""What a metric gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sphinxkit.evaluation.inputs import Record


@dataclass(frozen=True, slots=True)
class MetricResult:
    """The outcome of one metric over one set of records.

    Args:
        scores: Scores by name; numbers, or one level of numbers by label.
        unparsable: How many answers the strict rule could not read.
        lenient: The scores that the tolerant reading gives, where it is defined.
        notes: What a reader of the numbers must know (a policy, a category that is absent).
    """

    scores: dict[str, Any]
    unparsable: int = 0
    lenient: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


Metric = Callable[[Sequence[Record]], MetricResult]
