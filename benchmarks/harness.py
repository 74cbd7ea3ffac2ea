"""The harness: cases with their counted work and their candidates in, interleaved timings out.

A benchmark is a module ``bench_<name>.py`` with a docstring and ``cases(context)``, a generator of ``Case``.
README.md beside this file says how to write one.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import math
import re
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks import ceilings, surroundings
from benchmarks.counting import build_random as build_random
from benchmarks.counting import count_flops as count_flops
from benchmarks.counting import difference as difference
from benchmarks.counting import nbytes as nbytes
from benchmarks.results import CaseRecord, Document, Measurement, WorkRecord, line

T = TypeVar("T")
OURS = "sphinxkit"
FOLDER = Path(__file__).resolve().parent
# Our choice: shorter calls are repeated inside one timing until it lasts this long, so that the clock's own cost
# (a microsecond; a few for a pair of CUDA events) stays below a thousandth.
MIN_TIMED_SECONDS = 2e-3
MAX_CALLS = 200


@dataclass(frozen=True)
class Work:
    """The least work one call needs: FLOPs (a multiply-add is two), and bytes (inputs read once, outputs written once).

    Args:
        flops: Floating-point operations of the matrix unit.
        read_bytes: Bytes that must be read from memory.
        write_bytes: Bytes that must be written.
        disk_read_bytes: Bytes that must come from the disk.
        disk_write_bytes: Bytes that must go to the disk.
        dtype: The dtype whose matmul rate is the ceiling for ``flops``.
    """

    flops: float = 0
    read_bytes: float = 0
    write_bytes: float = 0
    disk_read_bytes: float = 0
    disk_write_bytes: float = 0
    dtype: torch.dtype = torch.float32

    def record(self) -> WorkRecord:
        """The same as it goes into the document."""
        values = {name: getattr(self, name) for name in WorkRecord.model_fields if name != "dtype"}
        return WorkRecord(dtype=str(self.dtype).removeprefix("torch."), **values)


@dataclass(frozen=True)
class Sample:
    """What a candidate that times itself returns instead of its output.

    Args:
        seconds: Its time.
        cpu_seconds: Its processor time, if known.
        peak_bytes: Peak extra memory, if known.
        output: What to compare with the other candidates' outputs.
        extra: Facts for the document (JSON-serialisable). Of several rounds, floats give their median, others the last.
    """

    seconds: float
    peak_bytes: float | None = None
    output: object = None
    extra: dict[str, Any] = field(default_factory=dict)
    cpu_seconds: float | None = None


@dataclass(frozen=True)
class Case:
    """One thing to measure, done by several candidates on the same inputs.

    Args:
        name: Unique within the benchmark: sizes, dtype.
        candidates: name -> callable taking the tensors of one input set; ours is called "sphinxkit". It may return its
            output (a tensor, or a list or tuple of them) or a Sample.
        work: Counted, not measured.
        inputs: Input sets, taken in turn by every round; several of them keep caches from helping.
        amount: How many ``unit`` one call does, for a rate; 0: no rate.
        unit: Of the rate: "tokens", "images", "bytes".
        tolerance: Largest relative L2 distance of an output to the first candidate's, else the case fails;
            0: bitwise; None: outputs are not compared.
        repeats: Rounds; None: the context's.
        max_seconds: After this long no further round is started (the first is always finished).
        skip: A reason not to run it: recorded, nothing is called.
        note: What a reader must know, a competitor that could not be made for instance.
    """

    name: str
    candidates: Mapping[str, Callable[..., object]] = field(default_factory=dict)
    work: Work = field(default_factory=Work)
    inputs: Sequence[tuple[Any, ...]] = ((),)
    amount: float = 0
    unit: str = ""
    tolerance: float | None = None
    repeats: int | None = None
    max_seconds: float = 60.0
    skip: str = ""
    note: str = ""


class Timer:
    """``with context.timer() as timer: ...`` then ``timer.seconds``: CUDA events on a GPU, the clock elsewhere.

    Attributes:
        seconds: Time in the block.
        cpu_seconds: Processor time of the block, all threads; None on a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.seconds = 0.0
        self.cpu_seconds: float | None = None

    def __enter__(self) -> Timer:
        if self._cuda:
            self._start = torch.cuda.Event(enable_timing=True)
            self._end = torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            self._start.record()
        self._begin, self._cpu_begin = time.perf_counter(), time.process_time()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._cuda:
            self._end.record()
            self._end.synchronize()
            self.seconds = self._start.elapsed_time(self._end) / 1e3
        else:
            self.seconds = time.perf_counter() - self._begin
            self.cpu_seconds = time.process_time() - self._cpu_begin


@dataclass(frozen=True)
class Context:
    """What a benchmark is run with.

    Args:
        device: Where to run.
        scratch: An existing folder for files, removed after the run.
        micro: Sizes so small that everything runs in a second: proves the code, measures nothing.
        quick: Sizes that take seconds on a CPU: a first look; benchmarks that have them say ``QUICK = True``.
        repeats: Rounds per case.
        deadline: ``time.monotonic()`` after which cases are skipped; None: no limit.
        case_seconds: After this long no case begins a further round, whatever it allows itself; None: no such limit.
    """

    device: torch.device
    scratch: Path
    micro: bool = False
    quick: bool = False
    repeats: int = 7
    deadline: float | None = None
    case_seconds: float | None = None

    def pick(self, full: T, micro: T, quick: T | None = None) -> T:
        """``full``, ``micro`` in a micro run, ``quick`` (if given) in a quick one."""
        return self.on(full, full, micro, quick)

    def on(self, cuda: T, cpu: T, micro: T, quick: T | None = None) -> T:
        """A size by device, ``micro`` in a micro run, ``quick`` (if given) in a quick one."""
        if self.micro:
            return micro
        if self.quick and quick is not None:
            return quick
        return cuda if self.device.type == "cuda" else cpu

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Fresh random data on the device (never zeros: they time differently)."""
        return torch.randn(shape, device=self.device, dtype=dtype)

    def num_input_sets(self, size: float) -> int:
        """How many input sets of ``size`` bytes overflow the caches: 2 to 8."""
        return 2 if self.micro else max(2, min(8, math.ceil(256e6 / max(size, 1))))

    def timer(self) -> Timer:
        """A timer for candidates that time themselves."""
        return Timer(self.device)

    @property
    def size(self) -> ceilings.Size:
        """Which sizes it runs at."""
        return "micro" if self.micro else "quick" if self.quick else "full"

    @property
    def seconds_left(self) -> float:
        """Until the deadline; infinite without one."""
        return math.inf if self.deadline is None else self.deadline - time.monotonic()


def _call(function: Callable[..., object], inputs: tuple[Any, ...], calls: int, device: torch.device) -> Sample:
    samples: list[Sample] = []
    output: object = None

    def block() -> None:
        nonlocal output
        for _ in range(calls):
            output = function(*inputs)
            if isinstance(output, Sample):
                samples.append(output)

    begin = time.process_time()
    seconds = ceilings.seconds_of(block, device)
    if samples:
        return samples[-1]
    cpu = (time.process_time() - begin) / calls if device.type == "cpu" else None
    return Sample(seconds / calls, output=output, cpu_seconds=cpu)


def _first_call(function: Callable[..., object], inputs: tuple[Any, ...], device: torch.device) -> Sample:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    output = function(*inputs)
    if isinstance(output, Sample):
        return output
    peak = float(torch.cuda.max_memory_allocated() - before) if device.type == "cuda" else None
    return Sample(0.0, peak_bytes=peak, output=output)


def measure(benchmark: str, case: Case, context: Context) -> CaseRecord:
    """Measure one case: compare the outputs, warm up, then rounds in which every candidate runs once, order rotating.

    A competitor that cannot run is left out with a note; one that computes something else fails the case, timed or not.
    """
    record = CaseRecord(
        benchmark=benchmark,
        case=case.name,
        status="skipped",
        reason=case.skip or "out of time",
        work=case.work.record(),
        unit=case.unit,
        amount=case.amount or None,
    )
    if case.skip or context.seconds_left <= 0:
        return record
    device, first, notes = context.device, {}, [case.note] if case.note else []
    with torch.no_grad():
        for name, candidate in case.candidates.items():
            try:
                first[name] = _first_call(candidate, case.inputs[0], device)
            except Exception as error:
                if name == OURS:
                    raise
                notes.append(f"{name} cannot run: {type(error).__name__}: {str(error)[:300]}")
        names = list(first)
        distances = {
            name: difference(first[name].output, first[names[0]].output) if case.tolerance is not None else None
            for name in names
        }
        wrong = [
            f"{name} differs from {names[0]} by {distance:.2e}, allowed {case.tolerance:.0e}"
            for name, distance in distances.items()
            if distance is not None and case.tolerance is not None and distance > case.tolerance
        ]
        peaks = {name: first[name].peak_bytes for name in names}
        timed_themselves = {name for name in names if first[name].seconds > 0}
        del first
        calls = dict.fromkeys(names, 1)
        for name in names:
            if name in timed_themselves:
                continue
            once = _call(case.candidates[name], case.inputs[-1], 1, device)
            if once.seconds < MIN_TIMED_SECONDS and not context.micro:
                calls[name] = min(MAX_CALLS, math.ceil(MIN_TIMED_SECONDS / max(once.seconds, 1e-7)))
        samples: dict[str, list[Sample]] = {name: [] for name in names}
        begin = time.monotonic()
        limit = min(case.max_seconds, math.inf if context.case_seconds is None else context.case_seconds)
        for round_index in range(context.pick(case.repeats or context.repeats, 2)):
            spent = time.monotonic() - begin
            if round_index and (spent > min(limit, context.seconds_left + spent)):
                break
            inputs = case.inputs[round_index % len(case.inputs)]
            shift = round_index % len(names)
            for name in names[shift:] + names[:shift]:
                sample = _call(case.candidates[name], inputs, calls[name], device)
                samples[name].append(dataclasses.replace(sample, output=None))
    measured = {name: _summarise(samples[name], calls[name], distances[name], peaks[name]) for name in names}
    speedup = {
        name: statistics.median(
            other.seconds / ours.seconds for ours, other in zip(samples[OURS], samples[name], strict=True)
        )
        for name in names
        if OURS in samples and name != OURS
    }
    cpu_speedup = {
        name: statistics.median(
            other.cpu_seconds / ours.cpu_seconds
            for ours, other in zip(samples[OURS], samples[name], strict=True)
            if ours.cpu_seconds and other.cpu_seconds
        )
        for name in speedup
        if all(sample.cpu_seconds for sample in samples[OURS] + samples[name])
    }
    status, reason = "failed" if wrong else "ok", "; ".join(wrong + notes)
    found = {"candidates": measured, "speedup": speedup, "cpu_speedup": cpu_speedup}
    return record.model_copy(update={"status": status, "reason": reason, **found})


def _summarise(samples: list[Sample], calls: int, distance: float | None, peak: float | None) -> Measurement:
    seconds = sorted(max(sample.seconds, 1e-9) for sample in samples)
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    cpu = [sample.cpu_seconds for sample in samples if sample.cpu_seconds]
    peaks = [sample.peak_bytes for sample in samples if sample.peak_bytes is not None]
    return Measurement(
        median=statistics.median(seconds),
        low=min(low, statistics.median(seconds)),
        high=max(high, statistics.median(seconds)),
        best=seconds[0],
        repeats=len(seconds),
        calls_per_repeat=calls,
        difference=distance,
        cpu=statistics.median(cpu) if cpu else None,
        peak_bytes=max(peaks, default=peak),
        extra=_typical([sample.extra for sample in samples]),
    )


def _typical(facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The last round's facts, floats by their median over the rounds that have them."""
    last = dict(facts[-1])
    for name, value in facts[-1].items():
        if isinstance(value, float):
            last[name] = statistics.median(other[name] for other in facts if isinstance(other.get(name), float))
    return last


def names() -> list[str]:
    """Every benchmark beside this file."""
    return sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))


def module(name: str) -> ModuleType:
    """The module of one benchmark.

    Raises:
        LookupError: There is none; the message lists those that exist.
    """
    if name not in names():
        raise LookupError(f"unknown benchmark {name!r}; there are: {', '.join(names())}")
    return importlib.import_module(f"benchmarks.bench_{name}")


def run(
    benchmarks: Sequence[str],
    context: Context,
    out: Path | None,
    *,
    only: str = "",
    note: str = "",
    log: Callable[[str], None] = print,
    plan: Mapping[str, float] | None = None,
) -> Document:
    """Run benchmarks one after the other, writing the document after every case.

    Args:
        benchmarks: Names, in order.
        context: Device, sizes, limits.
        out: JSON file, replaced whole after every case; None: no file.
        only: Regular expression that a case's name must contain a match of; others are left out.
        note: Goes into the document: what a reader of the numbers must know.
        log: Gets one line per case.
        plan: Seconds that each benchmark is expected to take. The time to the deadline is divided in these proportions,
            so that none starves those behind it; what one leaves goes to the next. None: first come, first served.
    """
    modules = [(name, module(name)) for name in benchmarks]
    disk = any(getattr(m, "USES_DISK", False) for _, m in modules)
    document = Document(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        device=context.device.type,  # type: ignore[arg-type]
        micro=context.micro,
        quick=context.quick,
        note=note,
        commit=surroundings.git_commit(),
        machine=surroundings.machine(context.device),
        versions=surroundings.versions(),
        load_average=[surroundings.load()],
        ceilings=ceilings.measure(context.device, context.scratch, context.size, disk),
    )
    _keep(document, out)
    deadlines = _deadlines(benchmarks, context, plan)
    for name, benchmark in modules:
        own = dataclasses.replace(context, deadline=deadlines.get(name, context.deadline))
        for record in _records(name, benchmark, own, only):
            document.results.append(record)
            _keep(document, out)
            log(line(record))
        document.load_average.append(surroundings.load())
        if context.seconds_left > 5 and context.size == "full":  # what the machine gives may drift: take the best
            document.ceilings = document.ceilings.best(ceilings.measure(context.device, context.scratch, "full", disk))
    document.finished = True
    _keep(document, out)
    return document


def _keep(document: Document, out: Path | None) -> None:
    if out is None:
        document.settle()
    else:
        document.write(out)


def _deadlines(names: Sequence[str], context: Context, plan: Mapping[str, float] | None) -> dict[str, float]:
    """Until when each benchmark may begin rounds."""
    total = sum((plan or {}).get(name, 0.0) for name in names)
    if plan is None or context.deadline is None or not total:
        return {}
    found, end, available = {}, time.monotonic(), max(context.seconds_left, 0.0)
    for name in names:
        end += available * plan.get(name, 0.0) / total
        found[name] = end
    return found


def _records(name: str, benchmark: ModuleType, context: Context, only: str) -> Iterator[CaseRecord]:
    devices = getattr(benchmark, "DEVICES", ("cpu", "cuda"))
    if context.device.type not in devices:
        yield CaseRecord(benchmark=name, case="all", status="skipped", reason=f"runs on {', '.join(devices)} only")
        return
    if context.seconds_left <= 0:
        yield CaseRecord(benchmark=name, case="all", status="skipped", reason="out of time")
        return
    label = ""
    try:
        for case in benchmark.cases(context):
            label = case.name
            try:
                if not only or re.search(only, label):
                    yield measure(name, case, context)
            except Exception as error:  # one broken case must not cost the others
                yield _failure(name, label, error)
            del case  # its models must be gone before the next ones are made
            if context.device.type == "cuda":
                torch.cuda.empty_cache()
    except Exception as error:
        yield _failure(name, f"after {label}" if label else "set-up", error)


def _failure(benchmark: str, case: str, error: Exception) -> CaseRecord:
    where = traceback.extract_tb(error.__traceback__)[-1]
    reason = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
    return CaseRecord(benchmark=benchmark, case=case, status="failed", reason=reason[-1500:])
