from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import bench_llm, greedy
from benchmarks.harness import Context, Sample


def scripted(rows: list[list[float]]):
    """Makes steps whose logits are the rows, whatever is read."""

    def make():
        lines = iter(rows)

        def step(tokens: Tensor) -> Tensor:
            return torch.tensor(next(lines))[None, None]

        return step

    return make


def test_the_first_differing_token_comes_with_its_margin_in_the_reference(tmp_path: Path) -> None:
    context = Context(torch.device("cpu"), tmp_path, micro=True)
    steps = {
        greedy.REFERENCE: scripted([[1.0, 0.0, 0.0], [0.0, 5.0, 4.75], [3.0, 2.0, 0.0]]),
        "same": scripted([[9.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]),
        "other": scripted([[1.0, 0.0, 0.0], [0.0, 5.0, 5.5], [0.0, 2.0, 0.0]]),
    }
    facts = greedy.differences(context, steps, greedy.REFERENCE, 4, prompt=4, new=3)
    assert set(facts) == {"same", "other"}
    deviation = float(torch.tensor([1.0, 0.0, 0.0, 0.0, 5.0, 4.75, 3.0, 2.0, 0.0]).std())
    assert facts["same"] == {"tokens that differ": 0, "deviation of all logits": pytest.approx(deviation)}
    assert facts["other"]["first differing token"] == 1
    assert facts["other"]["its logit margin"] == 0.25
    assert facts["other"]["tokens that differ"] == 2
    told = greedy.sentence(facts)
    assert "same: none; other: token 1 is the first, by a logit margin of 0.25, 2 in all" in told
    assert greedy.sentence({}) == ""


def test_facts_are_recorded(tmp_path: Path) -> None:
    context = Context(torch.device("cpu"), tmp_path, micro=True)
    call = bench_llm._timed_steps(context, scripted([[0.0, 1.0]] * 3), 2, {"tokens that differ": 1.0})
    sample = call(torch.zeros(1, 4, dtype=torch.int64))
    assert isinstance(sample, Sample)
    assert sample.extra == {"tokens that differ": 1.0}
