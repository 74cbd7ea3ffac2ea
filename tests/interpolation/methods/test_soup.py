from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sphinxkit import interpolation
from sphinxkit.errors import DataError
from sphinxkit.interpolation.methods.linear import Ema
from sphinxkit.interpolation.methods.soup import choose_soup
from tests.interpolation.tensors import FP32_ROUNDING, random


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


def test_greedy_soup_keeps_what_helps() -> None:
    target = torch.tensor([1.0, 1.0])
    models = [{"w": torch.tensor(w)} for w in ([1.5, 0.5], [9.0, 9.0], [0.5, 1.5], [1.6, 0.3])]

    def score(model: dict[str, Tensor]) -> float:
        return -(model["w"] - target).norm().item()

    soup, chosen = interpolation.greedy_soup(models, score)
    assert chosen.members == (0, 2)  # 1.5,0.5 with 0.5,1.5 hits the target; nothing else can improve on it
    assert soup["w"].tolist() == [1.0, 1.0]
    assert chosen.score == 0.0


def test_greedy_soup_wants_comparable_models() -> None:
    with pytest.raises(DataError, match="at least one model"):
        interpolation.greedy_soup([], lambda _: 0.0)
    with pytest.raises(DataError, match="do not hold the same tensors: b"):
        interpolation.greedy_soup([{"a": torch.zeros(1)}, {"a": torch.zeros(1), "b": torch.zeros(1)}], lambda _: 0.0)
    with pytest.raises(DataError, match="score of model 1 is not a number"):
        choose_soup([1.0, math.nan], lambda _: 0.0)
