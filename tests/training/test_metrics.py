"""What the log says of a step: of all processes, not of the first one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from sphinxkit.data.loading import BadSample
from sphinxkit.recipe import build
from sphinxkit.training import TrainPlan
from sphinxkit.training.metrics import StepMeter
from sphinxkit.training.parallel import ParallelDims
from sphinxkit.training.streams import StepData

ONE = StepData({}, {"a": ["1", "2"]}, {"a": [3, 4]}, bad=[BadSample("9", "torn")])
TWO = StepData({}, {"a": ["3"], "b": ["1"]}, {"a": [5], "b": [6]}, bad=[BadSample("8", "gone")], truncated=["3"])
BOTH = StepData({}, {"a": ["3", "1", "2"], "b": ["1"]}, {"a": [3, 4, 5], "b": [6]})


class Recorded(ParallelDims):
    """One of two processes; what it reduces is added to what the other one reduced."""

    def __init__(self, log: list[torch.Tensor], others: list[torch.Tensor] | None = None) -> None:
        super().__init__(0, 2, torch.device("cpu"))
        object.__setattr__(self, "log", log)
        object.__setattr__(self, "others", others)

    def reduce(self, values: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> torch.Tensor:
        self.log.append(values.clone())
        return values if self.others is None else values + self.others[len(self.log) - 1]

    def gather(self, value: Any) -> list[Any]:
        return [value, (1, [{"id": "8", "reason": "gone"}])]


@pytest.fixture
def meter(document):
    plan = TrainPlan(**document())
    model = build(plan.model, device="meta")
    return lambda dims: StepMeter(plan, model, dims)


def test_counts_and_digest_are_of_all_processes(meter) -> None:
    reduced: list[torch.Tensor] = []
    meter(Recorded(reduced)).measure(TWO, 2.0, is_skipped=False)
    record = meter(Recorded([], reduced)).measure(ONE, 2.0, is_skipped=False)
    assert (record["samples"], record["tokens"], record["truncated"]) == (4, 18, 1)
    assert record["tokens_per_second"] == 9.0
    assert [entry["id"] for entry in record["bad"]] == ["9", "8"]
    assert record["total"]["bad"] == 2
    alone = meter(ParallelDims(0, 1, torch.device("cpu"))).measure(BOTH, 1.0, is_skipped=True)
    assert record["data"] == alone["data"]  # however the samples are spread
    assert alone["total"]["skipped_steps"] == 1


def test_other_samples_have_another_digest(meter) -> None:
    one = meter(ParallelDims(0, 1, torch.device("cpu")))
    groups = [{"a": ["1", "2"]}, {"a": ["1"], "b": ["2"]}, {"a": ["1", "1", "2"]}, {"a": ["1", "3"]}, {"a": []}]
    assert len({one.measure(StepData({}, ids, {}), 1.0, is_skipped=False)["data"] for ids in groups}) == len(groups)
