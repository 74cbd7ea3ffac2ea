"""Command line: ``python -m benchmarks list | run | table | gpu`` (see README.md)."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks import harness, report

# In order of worth, for a lease that ends, with the seconds that each is expected to take on an H200: estimates from
# sizes and data sheet, as none has run there yet. Attention's is mostly the compilation of FlexAttention. "loading" is
# left out: it first writes 10 GB of random numbers, which takes minutes of its own.
GPU_PLAN = {
    "llm": 160,
    "end_to_end": 75,
    "attention": 75,
    "training": 40,
    "encoders": 30,
    "projectors": 5,
    "mixers": 5,
    "tilers": 10,
}
GPU_ORDER = list(GPU_PLAN)
GPU_SECONDS = 9 * 60
GPU_TEST_SECONDS = 2 * 60
GPU_CASE_SECONDS = 8  # further rounds of a case begin only within these; every candidate runs twice in any case
# --quick: a case begins further rounds only within these, and a benchmark further cases; our choice, for a minute each.
QUICK_CASE_SECONDS, QUICK_SECONDS, QUICK_REPEATS = 3.0, 40.0, 3


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code is 1 if a case failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the benchmarks and what each measures")

    run = commands.add_parser("run", help="measure")
    run.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    run.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument("--json", type=Path, metavar="OUT", help="document to write, rewritten after every case")
    run.add_argument("--quick", action="store_true", help="sizes that take less than a minute a benchmark on a CPU")
    run.add_argument("--micro", action="store_true", help="tiny sizes: proves every timed path, measures nothing")
    run.add_argument("--only", default="", metavar="REGEX", help="cases whose name matches")
    run.add_argument("--repeats", type=int, default=7, help="rounds per case (default 7)")
    run.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    run.add_argument("--seconds", type=float, help="skip cases once this much time has passed")
    run.add_argument("--case-seconds", type=float, help="no case begins a further round after this long")
    run.add_argument("--scratch", type=Path, help="folder for large files (default: the system's temporary folder)")
    run.add_argument("--note", default="", help="goes into the document and the table")

    table = commands.add_parser("table", help="render documents to RESULTS.md and plots")
    table.add_argument("documents", nargs="*", type=Path, help="default: benchmarks/results/*.json")
    table.add_argument("--out", type=Path, default=harness.FOLDER / "RESULTS.md")

    gpu = commands.add_parser("gpu", help="GPU tests, then everything worth running on one large GPU, in nine minutes")
    gpu.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets gpu_tests.log and gpu.json")
    gpu.add_argument("--seconds", type=float, default=GPU_SECONDS, help=f"for all of it (default {GPU_SECONDS})")
    gpu.add_argument("--no-tests", action="store_true", help="benchmarks only")
    gpu.add_argument("--micro", action="store_true", help="tiny sizes, on the CPU if there is no GPU: a dry run")
    options = parser.parse_args(arguments)
    commands_by_name = {"list": _list, "run": _run, "table": _table, "gpu": _gpu}
    return commands_by_name[options.command](options)


def _list(options: argparse.Namespace) -> int:
    for name in harness.names():
        summary = (harness.module(name).__doc__ or "").strip().splitlines()[0]
        print(f"{name:15} {summary}")
    return 0


def _check_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no CUDA device")


def _measure(
    options: argparse.Namespace,
    names: list[str],
    device: str,
    out: Path | None,
    deadline: float | None,
    case_seconds: float | None,
    plan: Mapping[str, float] | None = None,
) -> int:
    parent = getattr(options, "scratch", None)
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="sphinxkit-bench-", dir=parent) as scratch:
        context = harness.Context(
            device=torch.device(device),
            scratch=Path(scratch),
            micro=options.micro,
            quick=getattr(options, "quick", False),
            repeats=getattr(options, "repeats", 7),
            deadline=deadline,
            case_seconds=case_seconds,
        )
        document = harness.run(
            names,
            context,
            out,
            only=getattr(options, "only", ""),
            note=getattr(options, "note", ""),
            log=_log,
            plan=plan,
        )
    failed = [record for record in document.results if record.status == "failed"]
    if getattr(options, "quick", False) or out is None:
        print("\n".join(report.summary(document)))
    print(f"{f'{out}: ' if out else ''}{len(document.results)} cases, {len(failed)} failed")
    return 1 if failed else 0


def _run(options: argparse.Namespace) -> int:
    _check_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        names = options.names or harness.names()
        modules = {name: harness.module(name) for name in names}
    except LookupError as error:
        sys.exit(str(error))
    seconds, case_seconds = options.seconds, options.case_seconds
    if options.quick:
        has_quick = [name for name, module in modules.items() if getattr(module, "QUICK", False)]
        if options.names and has_quick != names:
            sys.exit(f"--quick: no quick sizes for {', '.join(name for name in names if name not in has_quick)}")
        names, options.repeats = has_quick, min(options.repeats, QUICK_REPEATS)
        seconds, case_seconds = seconds or QUICK_SECONDS * len(names), case_seconds or QUICK_CASE_SECONDS
    deadline = time.monotonic() + seconds if seconds else None
    return _measure(options, names, options.device, options.json, deadline, case_seconds)


def _table(options: argparse.Namespace) -> int:
    documents = options.documents or sorted((harness.FOLDER / "results").glob("*.json"))
    written = report.write(documents, options.out)
    print("\n".join(str(path) for path in written))
    return 0


def _gpu(options: argparse.Namespace) -> int:
    deadline = time.monotonic() + options.seconds
    device = "cpu" if options.micro and not torch.cuda.is_available() else "cuda"
    _check_device(device)
    options.out.mkdir(parents=True, exist_ok=True)
    tests = 0
    if not options.no_tests:
        log = options.out / "gpu_tests.log"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--color=no", "tests"]
        with log.open("w") as file:
            try:
                limit = min(GPU_TEST_SECONDS, options.seconds / 2)
                done = subprocess.run(
                    command,
                    cwd=harness.FOLDER.parent,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=limit,
                    check=False,
                )
                tests = done.returncode
            except subprocess.TimeoutExpired:
                tests = 124
        last = log.read_text().strip().splitlines()[-1:]
        print(f"pytest -m gpu: exit code {tests}: {' '.join(last)}", flush=True)
    names = [name for name in GPU_ORDER if name in harness.names()]
    planned = ", ".join(f"{name} {GPU_PLAN[name]} s" for name in names)
    print(f"{deadline - time.monotonic():.0f} s are left; planned, to be scaled to them: {planned}", flush=True)
    measured = _measure(options, names, device, options.out / "gpu.json", deadline, GPU_CASE_SECONDS, GPU_PLAN)
    return 1 if tests or measured else 0


def _log(text: str) -> None:
    """Progress goes to standard error, so that standard output stays for results."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
