from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import harness, results
from benchmarks.harness import Case, Context, Sample, Work

SLEEP_LIMIT = 1.0  # a sleep may last longer on a busy machine, never shorter

PLAN_SLACK = 60.0  # seconds that importing and measuring ceilings may take on a busy machine


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(torch.device("cpu"), tmp_path, repeats=3)


@pytest.fixture
def ceilings() -> results.Ceilings:
    return results.Ceilings(copy_bandwidth=100.0, read_bandwidth=200.0, matmul={"float32": 1000.0}, disk_read=10.0)


def test_measure_times_every_candidate(context: Context) -> None:
    case = Case("sleep", {"sphinxkit": lambda: time.sleep(0.01), "slow": lambda: time.sleep(0.1)})
    record = harness.measure("sleeping", case, context)
    assert record.status == "ok"
    assert 0.01 <= record.candidates["sphinxkit"].best < SLEEP_LIMIT
    assert record.candidates["slow"].repeats == 3
    assert record.speedup["slow"] > 1


def test_measure_takes_the_processor_time_beside_the_clock(context: Context) -> None:
    matrix = torch.randn(400, 400)
    work = {"sphinxkit": lambda: matrix @ matrix, "sleep": lambda: time.sleep(0.05)}
    record = harness.measure("x", Case("y", work), context)
    assert record.candidates["sphinxkit"].cpu is not None
    sleeping = record.candidates["sleep"].cpu
    assert sleeping is None or sleeping < 0.025  # sleeping costs next to nothing


def test_measure_repeats_short_calls_inside_one_timing(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "MIN_TIMED_SECONDS", 10.0)  # even a call that the machine interrupts is short
    record = harness.measure("x", Case("add", {"sphinxkit": lambda: 1 + 1}), context)
    assert record.candidates["sphinxkit"].calls_per_repeat == harness.MAX_CALLS


def test_measure_gives_every_candidate_the_same_input_in_a_round(context: Context) -> None:
    seen: dict[str, list[int]] = {"sphinxkit": [], "other": []}

    def record(name: str):
        def call(value: int) -> None:
            seen[name].append(value)
            time.sleep(harness.MIN_TIMED_SECONDS * 1.5)

        return call

    harness.measure("x", Case("order", {name: record(name) for name in seen}, inputs=[(0,), (1,)]), context)
    assert seen["sphinxkit"] == seen["other"] == [0, 1, 0, 1, 0]  # check, warm-up, three rounds


def test_measure_fails_a_candidate_that_computes_something_else(context: Context) -> None:
    case = Case("wrong", {"sphinxkit": lambda: torch.ones(3), "other": lambda: 2 * torch.ones(3)}, tolerance=0.1)
    record = harness.measure("x", case, context)
    assert record.status == "failed"
    assert "other differs from sphinxkit by 1.00e+00" in record.reason
    assert set(record.candidates) == {"sphinxkit", "other"}


def test_measure_leaves_out_a_competitor_that_cannot_run(context: Context) -> None:
    def broken() -> None:
        raise RuntimeError("no kernel")

    case = Case("y", {"sphinxkit": lambda: None, "other": broken}, note="third is not installed")
    record = harness.measure("x", case, context)
    assert (record.status, list(record.candidates)) == ("ok", ["sphinxkit"])
    assert record.reason == "third is not installed; other cannot run: RuntimeError: no kernel"
    with pytest.raises(RuntimeError, match="no kernel"):
        harness.measure("x", Case("y", {"sphinxkit": broken}), context)


def test_measure_takes_a_candidates_own_time(context: Context) -> None:
    case = Case("own", {"sphinxkit": lambda: Sample(0.25, peak_bytes=7, extra={"note": 1})})
    measured = harness.measure("x", case, context).candidates["sphinxkit"]
    assert (measured.median, measured.peak_bytes, measured.extra) == (0.25, 7, {"note": 1})


@pytest.mark.parametrize(("skip", "deadline", "reason"), [("no disk", None, "no disk"), ("", 0.0, "out of time")])
def test_measure_skips_with_a_reason(tmp_path: Path, skip: str, deadline: float | None, reason: str) -> None:
    context = Context(torch.device("cpu"), tmp_path, deadline=deadline)
    record = harness.measure("x", Case("y", {"sphinxkit": pytest.fail}, skip=skip), context)
    assert (record.status, record.reason) == ("skipped", reason)


def test_a_broken_case_is_recorded_and_the_next_one_runs(context: Context) -> None:
    def cases(context: Context):
        yield Case("broken", {"sphinxkit": lambda: [][0]})
        yield Case("fine", {"sphinxkit": lambda: None})
        raise ValueError("no more")

    records = list(harness._records("x", SimpleNamespace(cases=cases), context, ""))
    assert [(record.case, record.status) for record in records] == [
        ("broken", "failed"),
        ("fine", "ok"),
        ("after fine", "failed"),
    ]
    assert "IndexError" in records[0].reason
    assert "ValueError: no more" in records[2].reason


def test_a_context_can_cut_every_case_short(tmp_path: Path) -> None:
    context = Context(torch.device("cpu"), tmp_path, repeats=5, case_seconds=0.001)
    record = harness.measure("x", Case("sleep", {"sphinxkit": lambda: time.sleep(0.01)}), context)
    assert record.candidates["sphinxkit"].repeats == 1  # the first round is always finished


def test_a_plan_divides_the_time_and_hands_on_what_is_left(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: dict[str, float] = {}

    def bench(name: str):
        def cases(own: Context):
            left[name] = own.seconds_left
            yield Case(name, {"sphinxkit": lambda: None})

        return SimpleNamespace(cases=cases)

    modules = {name: bench(name) for name in ("a", "b", "c")}
    monkeypatch.setattr(harness, "module", modules.__getitem__)
    limited = dataclasses.replace(context, deadline=time.monotonic() + 1000.0, micro=True)
    document = harness.run(["a", "b", "c"], limited, tmp_path / "x.json", log=lambda _: None, plan={"a": 1, "b": 3})
    assert [record.status for record in document.results] == ["ok"] * 3
    # a quarter, all, all: nothing took its time; what the machine's ceilings took is less than the slack
    assert left["a"] == pytest.approx(250.0, abs=PLAN_SLACK)
    assert left["b"] == pytest.approx(1000.0, abs=PLAN_SLACK)
    assert left["c"] == pytest.approx(1000.0, abs=PLAN_SLACK)
    harness.run(["a"], limited, tmp_path / "x.json", log=lambda _: None)
    assert left["a"] == pytest.approx(1000.0, abs=PLAN_SLACK)  # no plan: the first may take it all


def test_only_leaves_out_other_cases(context: Context) -> None:
    module = SimpleNamespace(cases=lambda _: (Case(name, {"sphinxkit": lambda: None}) for name in ("ab", "cd")))
    assert [record.case for record in harness._records("x", module, context, "^c")] == ["cd"]


def test_benchmark_of_another_device_is_skipped(context: Context) -> None:
    module = SimpleNamespace(DEVICES=("cuda",), cases=pytest.fail)
    [record] = harness._records("x", module, context, "")
    assert (record.status, record.reason) == ("skipped", "runs on cuda only")


def test_benchmark_is_not_even_set_up_when_time_is_out(tmp_path: Path) -> None:
    context = Context(torch.device("cpu"), tmp_path, deadline=0.0)
    [record] = harness._records("x", SimpleNamespace(cases=pytest.fail), context, "")
    assert (record.status, record.reason) == ("skipped", "out of time")


def test_facts_of_several_rounds_are_medians_where_they_are_measured(context: Context) -> None:
    seconds = iter([9.0, 1.0, 5.0, 2.0])
    case = Case("x", {"sphinxkit": lambda: Sample(1.0, extra={"first s": next(seconds), "bytes": 7, "way": "a"})})
    measured = harness.measure("x", case, context).candidates["sphinxkit"]
    assert measured.extra == {"first s": 2.0, "bytes": 7, "way": "a"}  # of 1, 5 and 2; 9 was the check


@pytest.mark.parametrize(
    ("work", "floor"),
    [
        (Work(flops=5000), 5.0),  # 5000 / 1000
        (Work(flops=100, read_bytes=400, write_bytes=100), 3.0),  # 400 / 200 + 100 / 100
        (Work(disk_read_bytes=70, read_bytes=70), 7.0),  # 70 / 10
        (Work(), None),
        (Work(flops=5000, dtype=torch.bfloat16), None),  # its rate was not measured
    ],
)
def test_floor_is_the_longest_of_the_terms(work: Work, floor: float | None, ceilings: results.Ceilings) -> None:
    assert work.record().floor_seconds(ceilings) == floor


def test_best_ceilings_are_the_highest_of_both(ceilings: results.Ceilings) -> None:
    other = results.Ceilings(copy_bandwidth=1, read_bandwidth=300, matmul={"bfloat16": 2.0}, disk_write=4)
    best = ceilings.best(other)
    assert (best.copy_bandwidth, best.read_bandwidth, best.disk_read, best.disk_write) == (100, 300, 10, 4)
    assert best.matmul == {"float32": 1000.0, "bfloat16": 2.0}


def test_count_flops_of_a_known_network() -> None:
    # conv: 2*2 positions x 3*2*2 weights x 5 channels; linear: 4 rows x 5 x 7; a multiply-add is two
    def build():
        conv, linear = nn.Conv2d(3, 5, 2, stride=2), nn.Linear(5, 7)
        return lambda pixels: linear(conv(pixels).flatten(2).transpose(1, 2))

    assert harness.count_flops(build, (1, 3, 4, 4)) == 2 * (4 * 12 * 5 + 4 * 5 * 7)


def test_count_flops_counts_attention() -> None:
    def attend():
        return nn.functional.scaled_dot_product_attention

    shape = (2, 3, 5, 8)  # two products of 5 x 5 x 8 for each of six heads
    assert harness.count_flops(attend, shape, shape, shape) == 2 * 6 * (2 * 5 * 5 * 8)


def test_nbytes_counts_nested_tensors_and_modules() -> None:
    half = torch.zeros(3, dtype=torch.float16)
    assert harness.nbytes([half, (half,)], nn.Linear(2, 4)) == 6 + 6 + 4 * (8 + 4)


def test_difference_is_relative_and_never_hides_nan() -> None:
    one = torch.tensor([3.0, 4.0])
    assert harness.difference(one, one) == 0.0
    assert harness.difference(one * 1.1, one) == pytest.approx(0.1)
    assert harness.difference([one, one * 2], [one, one]) == pytest.approx(1.0)
    assert harness.difference(one * math.nan, one) == math.inf
    assert harness.difference(one[:1], one) == math.inf
    assert harness.difference("a", "b") == math.inf


def test_build_random_fills_everything_and_refuses_buffers() -> None:
    torch.manual_seed(0)
    module = harness.build_random(
        lambda: nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)), torch.device("cpu"), torch.bfloat16
    )
    assert module[0].weight.dtype == torch.bfloat16
    # 4096 values around 0 with 1/8: their mean and deviation are within 5 standard errors
    assert abs(module[0].weight.float().std() - 0.125) < 0.01
    assert abs(module[1].weight.float().mean() - 1) < 0.02
    with pytest.raises(ValueError, match="BatchNorm1d has buffers"):
        harness.build_random(lambda: nn.BatchNorm1d(4), torch.device("cpu"), torch.float32)


def test_unknown_benchmark_lists_the_known() -> None:
    with pytest.raises(LookupError, match=r"unknown benchmark 'nothing'; there are: .*mixers"):
        harness.module("nothing")


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.5, "1.5 s"), (0.0123, "12.3 ms"), (4.56e-6, "4.56 us"), (0.9999, "1e+03 ms")]
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert results.format_seconds(seconds) == text


@pytest.mark.gpu
def test_timer_on_the_gpu_waits_for_the_device() -> None:
    device = torch.device("cuda")
    matrix = torch.randn(8192, 8192, device=device)
    with Context(device, Path()).timer() as timer:
        for _ in range(20):
            matrix = (matrix @ matrix).clamp(-1, 1)
    # 20 products of 2 * 8192^3 FLOPs: no GPU does a quadrillion fp32 FLOPs in a second
    assert timer.seconds > 20 * 2 * 8192**3 / 1e15
