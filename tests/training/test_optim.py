from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sphinxkit.training import TrainPlan, learning_rate
from sphinxkit.training.optim import gradient_norm, make_optimizer, scale_gradients, set_learning_rate

# float32 through three steps of an optimiser
ADAM_RTOL = 1e-6


def test_schedule_by_hand() -> None:
    # 100 steps, 3 rising: 1/3, 2/3, 3/3 of the peak, then the cosine over 97 steps
    rates = [learning_rate(step, 100, 3.0, warmup_ratio=0.03) for step in range(100)]
    assert rates[:3] == pytest.approx([1.0, 2.0, 3.0])
    assert rates[3] == 3.0
    assert rates[3 + 48] == pytest.approx(1.5 * (1 + math.cos(math.pi * 48 / 97)))
    assert 0 < rates[99] < 0.01
    assert learning_rate(100, 100, 3.0) == pytest.approx(0.0)
    assert learning_rate(99, 100, 3.0, minimum=2.0) == pytest.approx(2.0, abs=1e-3)
    assert learning_rate(0, 10, 3.0, warmup_ratio=0.0) == 3.0
    assert learning_rate(0, 1, 3.0) == 3.0
    assert learning_rate(0, 50, 3.0, warmup_ratio=0.03) == pytest.approx(1.5)  # 1.5 steps are rounded up to 2
    assert learning_rate(50, 100, 3.0, warmup_ratio=0.0, minimum=2.0) == pytest.approx(2.5)


def test_adamw_by_its_formula(document) -> None:
    """Three steps in float64 from Adam's paper, with decay on matrices only."""
    matrix, vector = nn.Parameter(torch.full((1, 2), 2.0)), nn.Parameter(torch.full((2,), 2.0))
    plan = TrainPlan(**document(weight_decay=0.1, lr_scale={"image_delimiters": 0.5}))
    optimizer = make_optimizer({"llm": [matrix], "image_delimiters": [vector]}, plan)
    expected = {"matrix": 2.0, "vector": 2.0}
    m = v = 0.0
    for step, grad in enumerate((0.3, -0.2, 0.5), 1):
        matrix.grad, vector.grad = torch.full((1, 2), grad), torch.full((2,), grad)
        set_learning_rate(optimizer, 0.1)
        optimizer.step()
        m, v = 0.9 * m + 0.1 * grad, 0.95 * v + 0.05 * grad * grad
        change = m / (1 - 0.9**step) / (math.sqrt(v / (1 - 0.95**step)) + 1e-8)
        expected["matrix"] -= 0.1 * (change + 0.1 * expected["matrix"])
        expected["vector"] -= 0.05 * change
    assert matrix.tolist()[0] == pytest.approx([expected["matrix"]] * 2, rel=ADAM_RTOL)
    assert vector.tolist() == pytest.approx([expected["vector"]] * 2, rel=ADAM_RTOL)


def test_norm_and_clipping_by_hand() -> None:
    a, b, c = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    norm = gradient_norm([a, b, c])
    assert float(norm) == 5.0
    scale_gradients([a, b, c], norm, 1.0)
    assert a.grad.tolist() + b.grad.tolist() == pytest.approx([0.6, 0, 0, 0.8], rel=1e-6)
    scale_gradients([a, b, c], torch.tensor(1.0), 8.0)
    assert a.grad.tolist() + b.grad.tolist() == pytest.approx([0.6, 0, 0, 0.8], rel=1e-6)
    assert float(gradient_norm([c])) == 0.0
