"""Scoring a row of mixes: which betas, and which of them was best."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from sphinxkit.errors import DataError

MAX_POINTS = 1001  # a sweep of more is a slip of the pen: 0:1:0.001 has this many (our choice)


def parse_range(text: str) -> list[float]:
    """The numbers of ``START:STOP:STEP``, both ends included; ``0:1:0.1`` gives 0.1 and 0.3 exactly as typed.

    Args:
        text: Three decimal numbers.
    Raises:
        DataError: Not three numbers, a step that leads nowhere, or too many points.
    """
    try:
        start, stop, step = (Decimal(part.strip()) for part in text.split(":"))
        finite = start.is_finite() and stop.is_finite() and step.is_finite()
    except (ValueError, InvalidOperation) as error:
        raise DataError(f"sweep {text!r}: expected START:STOP:STEP, for example 0:1:0.1") from error
    if not finite or step <= 0 or stop < start:
        raise DataError(f"sweep {text!r}: needs START <= STOP and a positive STEP")
    count = int((stop - start) / step) + 1
    if count > MAX_POINTS:
        raise DataError(f"sweep {text!r}: {count} points, at most {MAX_POINTS} are tried")
    return [float(start + index * step) for index in range(count)]


@dataclass(frozen=True)
class SweepPoint:
    """One mix and its score.

    Attributes:
        beta: Weight of the first model.
        score: What the scoring function said.
    """

    beta: float
    score: float


@dataclass(frozen=True)
class SweepResult:
    """Every point of a sweep, in the order of the betas.

    Attributes:
        points: At least one.
        minimize: Whether a lower score is better.
    """

    points: tuple[SweepPoint, ...]
    minimize: bool = False

    @property
    def best(self) -> SweepPoint:
        """The best point; of equals the first."""
        return min(self.points, key=lambda point: point.score if self.minimize else -point.score)

    def end_point(self, beta: float) -> SweepPoint | None:
        """The point at ``beta`` (0 or 1, one of the models itself), if it was tried."""
        return next((point for point in self.points if point.beta == beta), None)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "points": [{"beta": point.beta, "score": point.score} for point in self.points],
            "best": {"beta": self.best.beta, "score": self.best.score},
            "minimize": self.minimize,
        }


def run_sweep(
    betas: Sequence[float],
    score: Callable[[float], float],
    *,
    minimize: bool = False,
    progress: Callable[[SweepPoint], None] | None = None,
) -> SweepResult:
    """Score every beta.

    Args:
        betas: Weights of the first model.
        score: Makes the mix and scores it.
        minimize: Whether a lower score is better.
        progress: Told each point as it is known.
    Raises:
        DataError: No betas, or a score that is not a finite number.
    """
    if not betas:
        raise DataError("a sweep needs at least one beta")
    points = []
    for beta in betas:
        value = float(score(beta))
        if not math.isfinite(value):
            raise DataError(f"the score at beta {beta:g} is {value}, not a finite number")
        points.append(SweepPoint(beta, value))
        if progress:
            progress(points[-1])
    return SweepResult(tuple(points), minimize)
