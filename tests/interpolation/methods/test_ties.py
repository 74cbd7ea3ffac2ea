from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sphinxkit import interpolation
from sphinxkit.interpolation.methods.ties import magnitude_thresholds
from tests.interpolation.tensors import vectors


def ties_oracle(base: list[float], models: list[list[float]], density: float, scale: float) -> list[float]:
    """Algorithm 1 of arXiv:2306.01708, element by element in Python's floats."""
    deltas = [[x - b for x, b in zip(model, base, strict=True)] for model in models]
    kept = []
    for delta in deltas:
        cut = sorted(map(abs, delta))[-max(1, int(density * len(delta) + 0.5))]
        kept.append([d if abs(d) >= cut else 0.0 for d in delta])
    result = []
    for b, column in zip(base, zip(*kept, strict=True), strict=True):
        total = sum(column)
        agreeing = [d for d in column if d * total > 0]
        result.append(b + scale * (sum(agreeing) / len(agreeing) if agreeing else 0.0))
    return result


def test_ties_worked_by_hand() -> None:
    # The situations of the paper's figure 1, with numbers: five parameters, three models, the top 60 % (3 of 5) kept.
    #                     redundant  agree  conflict  conflict  untouched
    base = torch.zeros(5)
    models = [
        torch.tensor([0.1, 3.0, 4.0, -2.0, 0.0]),  # keeps  .   3   4  -2   .
        torch.tensor([5.0, 1.0, -2.0, 0.5, 0.0]),  # keeps  5   1  -2   .   .
        torch.tensor([0.2, 2.0, -1.0, 6.0, 0.0]),  # keeps  .   2  -1   6   .
    ]
    # sums of what is kept:                              5   6   1   4   0  -> signs + + + + none
    # means of those with that sign:                     5   2   4   6   0
    result = interpolation.ties(base, models, density=0.6)
    assert result.tolist() == [5.0, 2.0, 4.0, 6.0, 0.0]
    assert interpolation.ties(base + 1, [m + 1 for m in models], density=0.6, scale=0.5).tolist() == [
        3.5,
        2.0,
        3.0,
        4.0,
        1.0,
    ]
    # weights 1, 3, 1 turn the third vote: 4 - 6 - 1 < 0, mean of -2 (three times) and -1 (once) is -7/4
    assert interpolation.ties(base, models, weights=[1, 3, 1], density=0.6)[2].item() == -1.75


@given(vectors(4), st.sampled_from([0.2, 0.5, 0.75, 1.0]), st.sampled_from([1.0, 0.3]))
def test_ties_agrees_with_the_algorithm(tensors: list[Tensor], density: float, scale: float) -> None:
    grid = [(tensor * 4).round() / 4 for tensor in tensors]  # sums of quarters are exact, so signs are not rounded away
    oracle = ties_oracle(grid[0].tolist(), [tensor.tolist() for tensor in grid[1:]], density, scale)
    result = interpolation.ties(grid[0], grid[1:], density=density, scale=scale)
    torch.testing.assert_close(result.double(), torch.tensor(oracle, dtype=torch.float64), atol=1e-4, rtol=1e-6)


@given(vectors(2), st.sampled_from([0.01, 0.2, 0.5, 0.99]))
def test_thresholds_are_exact(tensors: list[Tensor], density: float) -> None:
    deltas = (tensors[1] - tensors[0]).abs()
    keep = max(1, int(density * deltas.numel() + 0.5))
    found = magnitude_thresholds(lambda: iter([(0, [t.clone() for t in tensors])]), 1, density)
    assert found == [deltas.sort(descending=True).values[keep - 1].item()]
