"""Every timed path of every benchmark, at micro size."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks import ceilings, harness, results

TIME_LIMIT = 30.0  # a benchmark that takes longer at micro size does too much there
# Whom the issue wants us measured against: only what needs CUDA itself is missing from the dry run.
COMPETITORS = {
    "attention": {"sdpa", "eager", "flex, not compiled"},
    "llm": {
        *("eager loop, as the public code", "transformers, dynamic cache", "transformers, static cache"),
        *("sphinxkit, one row after another", "transformers, padded batches", "transformers, prompts sorted"),
        "transformers",
    },
    "end_to_end": {
        "eager, as the public code",
        "open_clip, timm, transformers",
        "asked anew",
    },
    "training": {"padded", "naive"},
}

LONG = {"attention", "end_to_end", "llm", "loading", "sources", "training"}  # more than two seconds


def test_there_are_benchmarks() -> None:
    assert {"encoders", "mixers", "tilers", "projectors", "interpolation", "formatters"} < set(harness.names())
    assert set(harness.names()) > LONG


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in harness.names()]
)
def test_micro_run_is_valid_and_complete(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    context = harness.Context(torch.device("cpu"), tmp_path, micro=True)
    harness.run([name], context, out, log=lambda _: None)
    document = results.read(out)
    assert document.finished
    assert document.micro
    assert document.results
    failures = [f"{record.case}: {record.reason}" for record in document.results if record.status == "failed"]
    assert not failures
    found = {candidate for record in document.results for candidate in record.candidates}
    assert COMPETITORS.get(name, set()) <= found
    for record in document.results:
        if record.status == "ok":
            assert harness.OURS in record.candidates
            assert all(measured.median < TIME_LIMIT for measured in record.candidates.values())


@pytest.mark.parametrize("name", harness.names())
def test_benchmark_says_what_it_is(name: str) -> None:
    module = harness.module(name)
    assert (module.__doc__ or "").strip()
    assert set(getattr(module, "DEVICES", ("cpu", "cuda"))) <= {"cpu", "cuda"}


QUICK = (
    "attention",
    "encoders",
    "folders",
    "formatters",
    "interpolation",
    "llm",
    "loading",
    "mixers",
    "projectors",
    "startup",
    "tilers",
)


def test_every_part_has_quick_sizes_and_its_command_in_the_docs() -> None:
    text = (harness.FOLDER / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"python -m benchmarks run (\w+) --quick", text)) == set(QUICK)
    assert {name for name in harness.names() if getattr(harness.module(name), "QUICK", False)} >= set(QUICK)


def test_quick_prints_measured_over_floor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ceilings.COPY_ELEMENTS, "quick", 2**16)
    monkeypatch.setitem(ceilings.MATMUL_SIDE, "quick", 64)
    assert command_line.main(["run", "mixers", "--quick", "--device", "cpu", "--only", "sequence.*bfloat16"]) == 0
    head, ours, theirs, last = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "case"
    assert head.endswith("measured / floor")
    assert re.search(r"sphinxkit +[\d.]+ [mu]?s +[\d.]+ [mu]?s +[\d.e+]+$", ours)
    assert "torch.cat" in theirs
    assert last == "1 cases, 0 failed"


def test_quick_refuses_what_has_no_quick_sizes() -> None:
    with pytest.raises(SystemExit, match="--quick: no quick sizes for training"):
        command_line.main(["run", "mixers", "training", "--quick", "--device", "cpu"])


def test_command_line_runs_and_renders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.json"
    arguments = ["run", "projectors", "--micro", "--device", "cpu", "--json", str(out), "--only", "linear"]
    assert command_line.main(arguments) == 0
    assert "2 cases, 0 failed" in capsys.readouterr().out
    assert command_line.main(["table", str(out), "--out", str(tmp_path / "RESULTS.md")]) == 0
    assert "### projectors" in (tmp_path / "RESULTS.md").read_text()
    assert command_line.main(["list"]) == 0
    assert "projectors" in capsys.readouterr().out


def test_command_line_refuses_an_unknown_benchmark(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="unknown benchmark 'nothing'"):
        command_line.main(["run", "nothing", "--device", "cpu", "--json", str(tmp_path / "a.json")])


def test_command_line_refuses_a_gpu_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch sees no CUDA device"):
        command_line.main(["run", "--device", "cuda", "--json", str(tmp_path / "a.json")])


def test_gpu_dry_run_covers_its_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command_line, "GPU_ORDER", ["projectors", "mixers"])
    assert command_line.main(["gpu", "--micro", "--no-tests", "--out", str(tmp_path)]) == 0
    document = results.read(tmp_path / "gpu.json")
    assert {record.benchmark for record in document.results} == {"projectors", "mixers"}


def test_gpu_plan_holds_what_runs_on_a_gpu_and_fits_its_time() -> None:
    on_gpu = {name for name in harness.names() if "cuda" in getattr(harness.module(name), "DEVICES", ("cpu", "cuda"))}
    assert set(command_line.GPU_PLAN) == on_gpu - {"loading"}  # which writes for minutes before it measures
    assert sum(command_line.GPU_PLAN.values()) + command_line.GPU_TEST_SECONDS <= command_line.GPU_SECONDS


def test_committed_documents_are_valid() -> None:
    for path in (harness.FOLDER / "results").glob("*.json"):
        assert not results.read(path).micro
