from __future__ import annotations

import itertools
import math

import hypothesis.extra.numpy as npst
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sphinxkit import interpolation
from sphinxkit.errors import DataError, ShapeError
from sphinxkit.interpolation.method import BLOCK
from sphinxkit.interpolation.methods.linear import Ema
from sphinxkit.interpolation.methods.soup import choose_soup
from sphinxkit.interpolation.methods.ties import magnitude_thresholds

FP32_ROUNDING = 1e-6  # a handful of float32 roundings (6e-8 each) on values of order one
SLERP_ROUNDING = 1e-5  # an angle of float32 vectors, then float32 products; values of order one
ARC_VS_LINE = 1e-6  # at the angle below which slerp turns linear both differ by 1e-8, the rest is float32 rounding

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(bits), b.view(bits))


def vectors(count: int) -> st.SearchStrategy[list[Tensor]]:
    size = st.shared(st.integers(1, 40), key="size")
    values = st.floats(-100, 100, width=32)
    one = size.flatmap(lambda n: npst.arrays(np.float32, n, elements=values))
    return st.lists(one, min_size=count, max_size=count).map(lambda arrays: [torch.from_numpy(a) for a in arrays])


# ---- oracles: the papers' formulas in float64 ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [-0.5, 0.25, 0.5, 0.9, 1.5])
def test_lerp_is_the_weighted_sum(dtype: torch.dtype, t: float) -> None:
    a, b = random(7, 5, seed=1, dtype=dtype), random(7, 5, seed=2, dtype=dtype)
    oracle = (1 - t) * a.double() + t * b.double()
    torch.testing.assert_close(
        interpolation.lerp(a, b, t), oracle.to(dtype), atol=FP32_ROUNDING, rtol=torch.finfo(dtype).eps
    )
    torch.testing.assert_close(interpolation.wise_ft(a, b, 0.3), interpolation.lerp(a, b, 0.3), atol=0, rtol=0)


def test_linear_accumulates_in_float32_and_gives_the_dtype_asked_for() -> None:
    tensors = [random(50, seed=seed, dtype=torch.bfloat16) for seed in range(5)]
    weights = [0.1, 0.25, -0.3, 0.55, 0.4]
    oracle = sum(w * t.double() for w, t in zip(weights, tensors, strict=True))
    result = interpolation.linear(tensors, weights, dtype=torch.float32)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), oracle, atol=FP32_ROUNDING, rtol=0)
    torch.testing.assert_close(
        interpolation.linear(tensors, weights, normalize=True, dtype=torch.float32).double(),
        oracle,
        atol=FP32_ROUNDING,
        rtol=0,
    )
    assert interpolation.linear(tensors, weights).dtype == torch.bfloat16
    assert interpolation.linear([tensors[0], tensors[1].half()], (0.5, 0.5)).dtype == torch.float32


def test_normalize_divides_by_the_sum() -> None:
    a, b = random(9, seed=1), random(9, seed=2)
    oracle = 0.75 * a.double() + 0.25 * b.double()
    torch.testing.assert_close(
        interpolation.linear((a, b), (3, 1), normalize=True).double(), oracle, atol=FP32_ROUNDING, rtol=0
    )


def test_float64_inputs_are_accumulated_in_float64() -> None:
    a, b = torch.tensor([1.0 + 1e-12], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
    assert interpolation.lerp(a, b, 0.5).item() == pytest.approx(1.0 + 5e-13, abs=2e-16)


def slerp_oracle(a: Tensor, b: Tensor, t: float) -> Tensor:
    a, b = a.double(), b.double()
    angle = math.acos((a.flatten() @ b.flatten() / (a.norm() * b.norm())).item())
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.8])
def test_slerp_follows_the_arc(t: float) -> None:
    a, b = random(6, 4, seed=1), random(6, 4, seed=2)
    torch.testing.assert_close(
        interpolation.slerp(a, b, t).double(), slerp_oracle(a, b, t), atol=SLERP_ROUNDING, rtol=0
    )
    unit_a, unit_b = a / a.norm(), b / b.norm()
    assert interpolation.slerp(unit_a, unit_b, t).norm().item() == pytest.approx(1, abs=SLERP_ROUNDING)


def test_slerp_by_hand() -> None:
    # 30 of 90 degrees between the axes: (cos 30, sin 30)
    result = interpolation.slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 1 / 3)
    assert result.tolist() == pytest.approx([math.sqrt(3) / 2, 0.5], abs=FP32_ROUNDING)


def test_task_arithmetic_adds_and_forgets() -> None:
    base, a, b = (random(8, 3, seed=seed) for seed in range(3))
    oracle = base.double() + 0.7 * (a.double() - base.double()) - 0.4 * (b.double() - base.double())
    result = interpolation.task_arithmetic(base, [a, b], [0.7, -0.4])
    torch.testing.assert_close(result.double(), oracle, atol=FP32_ROUNDING, rtol=0)


def test_uniform_soup_and_ema() -> None:
    tensors = [random(11, seed=seed) for seed in range(4)]
    mean = torch.stack(tensors).double().mean(0)
    torch.testing.assert_close(interpolation.uniform_soup(tensors).double(), mean, atol=FP32_ROUNDING, rtol=0)
    average, oracle = tensors[0], tensors[0].double()
    for tensor in tensors[1:]:
        average = interpolation.ema(average, tensor, 0.9)
        oracle = 0.9 * oracle + (1 - 0.9) * tensor.double()
    torch.testing.assert_close(average.double(), oracle, atol=FP32_ROUNDING, rtol=0)
    at_once = interpolation.linear(tensors, Ema(0.9).default_weights(4))
    torch.testing.assert_close(at_once.double(), oracle, atol=FP32_ROUNDING, rtol=0)


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


def test_dare_drops_and_rescales() -> None:
    base, tuned = torch.full((40_000,), 2.0), torch.full((40_000,), 3.0)
    result = interpolation.dare(base, [tuned], [1.0], drop_rate=0.75, seed=5)
    assert set(result.unique().tolist()) == {2.0, 6.0}  # kept differences of 1 become 1 / (1 - 0.75) = 4
    kept = (result == 6.0).double().mean().item()
    assert kept == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / 40_000))  # five standard deviations
    assert same_bits(result, interpolation.dare(base, [tuned], [1.0], drop_rate=0.75, seed=5))
    assert not torch.equal(result, interpolation.dare(base, [tuned], [1.0], drop_rate=0.75, seed=6))


def test_dare_without_dropping_is_task_arithmetic_and_models_draw_on_their_own() -> None:
    base, a, b = (random(500, seed=seed) for seed in range(3))
    torch.testing.assert_close(
        interpolation.dare(base, [a, b], [0.5, 0.5], drop_rate=0.0),
        interpolation.task_arithmetic(base, [a, b], [0.5, 0.5]),
    )
    both = interpolation.dare(torch.zeros(5000), [torch.ones(5000), torch.ones(5000)], [1.0, 10.0], drop_rate=0.5)
    assert set(both.unique().tolist()) == {0.0, 2.0, 20.0, 22.0}


def test_dare_draws_anew_in_every_block() -> None:
    base, tuned = torch.zeros(2 * BLOCK), torch.ones(2 * BLOCK)
    result = interpolation.dare(base, [tuned], [1.0], drop_rate=0.5)
    assert not torch.equal(result[:BLOCK], result[BLOCK:])


def test_greedy_soup_keeps_what_helps() -> None:
    target = torch.tensor([1.0, 1.0])
    models = [{"w": torch.tensor(w)} for w in ([1.5, 0.5], [9.0, 9.0], [0.5, 1.5], [1.6, 0.3])]

    def score(model: dict[str, Tensor]) -> float:
        return -(model["w"] - target).norm().item()

    soup, chosen = interpolation.greedy_soup(models, score)
    assert chosen.members == (0, 2)  # 1.5,0.5 with 0.5,1.5 hits the target; nothing else can improve on it
    assert soup["w"].tolist() == [1.0, 1.0]
    assert chosen.score == 0.0


# ---- laws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_end_points_are_bitwise(dtype: torch.dtype) -> None:
    a, b, base = (random(4, 6, seed=seed, dtype=dtype) for seed in range(3))
    a[0, 0], b[0, 0] = -0.0, math.nan
    for op in (interpolation.lerp, interpolation.slerp, interpolation.wise_ft):
        assert same_bits(op(a, b, 0), a)
        assert same_bits(op(a, b, 1), b)
    assert same_bits(interpolation.linear((a, b, base), (0, 1, 0)), b)
    assert same_bits(interpolation.ema(a, b, 1), a)
    assert same_bits(interpolation.ema(a, b, 0), b)
    assert same_bits(interpolation.task_arithmetic(base, [a, b], [1, 0]), a)
    assert same_bits(interpolation.task_arithmetic(base, [a, b], [0, 0]), base)
    assert same_bits(interpolation.ties(base, [a, b], [0, 1], density=1), b)
    assert same_bits(interpolation.dare(base, [a, b], [0, 1], drop_rate=0), b)
    assert same_bits(interpolation.uniform_soup([a]), a)
    assert interpolation.lerp(a, b, 0).data_ptr() != a.data_ptr()


@given(vectors(2), st.floats(0, 1))
def test_two_models_in_either_order_give_the_same_bits(tensors: list[Tensor], t: float) -> None:
    a, b = tensors
    assert same_bits(interpolation.linear((a, b), (1 - t, t)) + 0.0, interpolation.linear((b, a), (t, 1 - t)) + 0.0)


@given(vectors(3), st.lists(st.floats(-1, 1), min_size=3, max_size=3))
def test_order_does_not_matter(tensors: list[Tensor], weights: list[float]) -> None:
    results = [
        interpolation.linear([tensors[i] for i in order], [weights[i] for i in order])
        for order in itertools.permutations(range(3))
    ]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=300 * FP32_ROUNDING, rtol=0)  # sums of up to 300


@given(vectors(3), st.lists(st.floats(0.1, 1), min_size=3, max_size=3))
def test_linear_is_associative_within_rounding(tensors: list[Tensor], weights: list[float]) -> None:
    first = weights[0] + weights[1]
    pair = interpolation.linear(tensors[:2], [weights[0] / first, weights[1] / first])
    nested = interpolation.linear([pair, tensors[2]], [first, weights[2]])
    torch.testing.assert_close(nested, interpolation.linear(tensors, weights), atol=300 * FP32_ROUNDING, rtol=0)


@given(vectors(1), st.floats(0.01, 10), st.floats(0, 1))
def test_slerp_of_parallel_vectors_is_linear(tensors: list[Tensor], factor: float, t: float) -> None:
    a = tensors[0]
    b = a * factor
    torch.testing.assert_close(
        interpolation.slerp(a, b, t), interpolation.lerp(a, b, t), atol=1000 * ARC_VS_LINE, rtol=ARC_VS_LINE
    )


@pytest.mark.parametrize("factor", [0.0, -1.0, -2.5])
def test_slerp_is_defined_where_the_arc_is_not(factor: float) -> None:
    a = random(30, seed=3)
    assert torch.equal(interpolation.slerp(a, a * factor, 0.3), interpolation.lerp(a, a * factor, 0.3))
    assert torch.equal(interpolation.slerp(a * factor, a, 0.3), interpolation.lerp(a * factor, a, 0.3))
    assert torch.equal(interpolation.slerp(a * 0, a * 0, 0.3), a * 0)


def test_inputs_are_left_alone() -> None:
    base, a, b = (random(20, seed=seed) for seed in range(3))
    copies = [t.clone() for t in (base, a, b)]
    interpolation.lerp(a, b, 0.5), interpolation.slerp(a, b, 0.5), interpolation.task_arithmetic(base, [a, b], [1, 1])
    interpolation.ties(base, [a, b]), interpolation.dare(base, [a, b], [1, 1])
    for tensor, copy in zip((base, a, b), copies, strict=True):
        assert same_bits(tensor, copy)


def test_empty_tensors_and_tensors_without_order() -> None:
    assert interpolation.lerp(torch.empty(0, 3), torch.empty(0, 3), 0.5).shape == (0, 3)
    a, b = random(4, 5, seed=1), random(4, 5, seed=2)
    assert torch.equal(interpolation.lerp(a.T, b.T, 0.3), interpolation.lerp(a, b, 0.3).T)
    assert interpolation.ties(torch.empty(0), [torch.empty(0)]).shape == (0,)


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_shapes_must_agree() -> None:
    with pytest.raises(ShapeError, match=r"one shape, got \(2,\), \(3,\)"):
        interpolation.lerp(torch.zeros(2), torch.zeros(3), 0.5)
    with pytest.raises(ShapeError, match=r"one shape, got \(2,\), \(3,\)"):
        interpolation.lerp(torch.zeros(2), torch.zeros(3), 0)
    with pytest.raises(ShapeError, match="no tensors"):
        interpolation.linear([], [])
    with pytest.raises(ShapeError, match="no tensors"):
        interpolation.uniform_soup([])


def test_weights_must_be_usable() -> None:
    a = torch.zeros(2)
    with pytest.raises(DataError, match="1 weights were given for 2 tensors"):
        interpolation.linear([a, a], [1.0])
    with pytest.raises(DataError, match="must be finite"):
        interpolation.lerp(a, a, math.nan)
    with pytest.raises(DataError, match="sum to 0"):
        interpolation.linear([a, a], [1, -1], normalize=True)
    with pytest.raises(DataError, match=r"alpha must be in \[0, 1\], got 1.5"):
        interpolation.wise_ft(a, a, 1.5)
    with pytest.raises(DataError, match=r"decay must be in \[0, 1\]"):
        interpolation.ema(a, a, -0.1)
    with pytest.raises(DataError, match=r"density must be in \(0, 1\]"):
        interpolation.ties(a, [a], density=0)
    with pytest.raises(DataError, match=r"drop_rate must be in \[0, 1\)"):
        interpolation.dare(a, [a], [1.0], drop_rate=1)


def test_only_floating_point_is_mixed() -> None:
    with pytest.raises(DataError, match="only floating point"):
        interpolation.lerp(torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64), 0.5)


def test_greedy_soup_wants_comparable_models() -> None:
    with pytest.raises(DataError, match="at least one model"):
        interpolation.greedy_soup([], lambda _: 0.0)
    with pytest.raises(DataError, match="do not hold the same tensors: b"):
        interpolation.greedy_soup([{"a": torch.zeros(1)}, {"a": torch.zeros(1), "b": torch.zeros(1)}], lambda _: 0.0)
    with pytest.raises(DataError, match="score of model 1 is not a number"):
        choose_soup([1.0, math.nan], lambda _: 0.0)


def test_nothing_to_add_is_the_base_bit_for_bit() -> None:
    base = torch.tensor([-0.0, 1e-45, 3.0])
    other = torch.tensor([1.0, 2.0, math.nan])
    for result in (
        interpolation.ties(base, [other], [0.0]),
        interpolation.ties(base, [other], scale=0.0),
        interpolation.ties(base, []),
        interpolation.dare(base, [other], [0.0]),
        interpolation.dare(base, [], []),
        interpolation.task_arithmetic(base, [other], [0.0]),
    ):
        assert torch.equal(result.view(torch.int32), base.view(torch.int32))
        assert result.data_ptr() != base.data_ptr()
