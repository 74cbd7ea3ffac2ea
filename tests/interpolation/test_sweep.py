from __future__ import annotations

import math

import pytest

from sphinxkit.errors import DataError
from sphinxkit.interpolation.sweep import SweepPoint, SweepResult, parse_range, run_sweep


def test_ranges_are_what_was_typed() -> None:
    assert parse_range("0:1:0.1") == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert parse_range("0.5:0.5:1") == [0.5]
    assert parse_range("-0.5:1.5:1") == [-0.5, 0.5, 1.5]
    assert parse_range("0:1:0.3") == [0.0, 0.3, 0.6, 0.9]


@pytest.mark.parametrize("text", ["0:1", "a:b:c", "0:1:0.1:2", ""])
def test_ranges_that_are_none(text: str) -> None:
    with pytest.raises(DataError, match="expected START:STOP:STEP"):
        parse_range(text)


@pytest.mark.parametrize("text", ["1:0:0.1", "0:1:0", "0:1:-0.1", "0:inf:1", "nan:1:1"])
def test_ranges_that_lead_nowhere(text: str) -> None:
    with pytest.raises(DataError, match="needs START <= STOP"):
        parse_range(text)


def test_too_many_points() -> None:
    with pytest.raises(DataError, match="10001 points, at most 1001"):
        parse_range("0:1:0.0001")


def test_sweep() -> None:
    seen: list[SweepPoint] = []
    result = run_sweep([0.0, 0.5, 1.0], lambda beta: -((beta - 0.4) ** 2), progress=seen.append)
    assert result.best.beta == 0.5
    assert list(result.points) == seen
    assert result.end_point(1.0) == seen[2]
    assert result.end_point(0.25) is None
    assert run_sweep([0.0, 1.0], lambda beta: beta, minimize=True).best.beta == 0.0
    assert result.to_dict()["best"]["beta"] == 0.5
    assert SweepResult((SweepPoint(0, 1), SweepPoint(1, 1))).best.beta == 0


def test_bad_sweeps() -> None:
    with pytest.raises(DataError, match="at least one beta"):
        run_sweep([], lambda beta: beta)
    with pytest.raises(DataError, match="score at beta 0.5 is nan"):
        run_sweep([0.5], lambda _: math.nan)
