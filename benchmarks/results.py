"""What a benchmark run writes: the documents, as pydantic models, so that reading one validates it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, model_validator

from sphinxkit.atomic import atomic_file


class Record(BaseModel):
    """Base of all records: unknown keys are an error."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Ceilings(Record):
    """Rates that this machine reached in this run, the best of all times they were measured.

    Args:
        copy_bandwidth: Bytes per second of a large copy, bytes read plus bytes written.
        read_bandwidth: Bytes per second of a large sum.
        matmul: dtype name -> FLOP/s of a large square product.
        disk_read: Bytes per second of reading a file that is not in the page cache; None: not measured.
        disk_write: Bytes per second of writing and syncing a file.
        disk_copy: Bytes per second (bytes of the file, counted once) of copying one file that is not in the cache.
    """

    copy_bandwidth: PositiveFloat
    read_bandwidth: PositiveFloat
    matmul: dict[str, PositiveFloat]
    disk_read: PositiveFloat | None = None
    disk_write: PositiveFloat | None = None
    disk_copy: PositiveFloat | None = None

    def best(self, other: Ceilings) -> Ceilings:
        """The higher rate of both, one by one."""

        def higher(a: float | None, b: float | None) -> float | None:
            return max((x for x in (a, b) if x is not None), default=None)

        return Ceilings(
            copy_bandwidth=max(self.copy_bandwidth, other.copy_bandwidth),
            read_bandwidth=max(self.read_bandwidth, other.read_bandwidth),
            matmul={
                name: max(self.matmul.get(name, 0.0), other.matmul.get(name, 0.0))
                for name in {**self.matmul, **other.matmul}
            },
            disk_read=higher(self.disk_read, other.disk_read),
            disk_write=higher(self.disk_write, other.disk_write),
            disk_copy=higher(self.disk_copy, other.disk_copy),
        )


class WorkRecord(Record):
    """The least work that the case needs: FLOPs, bytes of memory, bytes of disk."""

    flops: NonNegativeFloat = 0
    read_bytes: NonNegativeFloat = 0
    write_bytes: NonNegativeFloat = 0
    disk_read_bytes: NonNegativeFloat = 0
    disk_write_bytes: NonNegativeFloat = 0
    dtype: str = "float32"

    def floor_seconds(self, ceilings: Ceilings) -> float | None:
        """The longest of arithmetic, memory and disk time at the measured ceilings; None if nothing was counted."""
        terms = [
            self.read_bytes / ceilings.read_bandwidth + self.write_bytes / ceilings.copy_bandwidth,
            self.flops / ceilings.matmul[self.dtype] if self.flops and self.dtype in ceilings.matmul else 0.0,
            self.disk_read_bytes / ceilings.disk_read if ceilings.disk_read else 0.0,
            self.disk_write_bytes / ceilings.disk_write if ceilings.disk_write else 0.0,
        ]
        return max(terms) or None


class Measurement(Record):
    """One candidate's times in seconds, over the rounds of its case."""

    median: PositiveFloat
    low: PositiveFloat = Field(description="lower quartile")
    high: PositiveFloat = Field(description="upper quartile")
    best: PositiveFloat
    repeats: int = Field(ge=1)
    calls_per_repeat: int = Field(ge=1)
    difference: float | None = Field(default=None, description="relative L2 distance of its output to the first's")
    cpu: PositiveFloat | None = Field(
        default=None, description="median processor time of all threads; on a shared machine steadier than the clock"
    )
    peak_bytes: float | None = Field(default=None, description="peak extra memory: allocator on CUDA, RssAnon on CPU")
    over_floor: float | None = None
    extra: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _ordered(self) -> Measurement:
        if not self.best <= self.low <= self.median <= self.high:
            raise ValueError(f"times out of order: {self.best} {self.low} {self.median} {self.high}")
        return self


class CaseRecord(Record):
    """One case of one benchmark."""

    benchmark: str
    case: str
    status: Literal["ok", "skipped", "failed"]
    reason: str = ""
    work: WorkRecord = Field(default_factory=WorkRecord)
    floor_seconds: float | None = None
    unit: str = ""
    amount: float | None = Field(default=None, description="units done by one call")
    candidates: dict[str, Measurement] = Field(default_factory=dict)
    speedup: dict[str, float] = Field(
        default_factory=dict, description="competitor's time over ours, median over rounds; above 1 we are faster"
    )
    cpu_speedup: dict[str, float] = Field(default_factory=dict, description="the same of processor times")

    @model_validator(mode="after")
    def _complete(self) -> CaseRecord:
        if self.status == "ok" and not self.candidates:
            raise ValueError(f"{self.benchmark}/{self.case}: ok, but nothing was measured")
        if self.status != "ok" and not self.reason:
            raise ValueError(f"{self.benchmark}/{self.case}: {self.status} without a reason")
        return self


class Document(Record):
    """Everything that one run measured, with where and when."""

    schema_version: Literal[1] = 1
    date: str
    finished: bool = False
    device: Literal["cpu", "cuda"]
    micro: bool = Field(description="tiny sizes that prove the code paths; the numbers mean nothing")
    quick: bool = Field(default=False, description="sizes that take seconds: a first look")
    note: str = ""
    commit: str = ""
    machine: dict[str, Any]
    versions: dict[str, str]
    load_average: list[float] = Field(description="one-minute load average at the start and after each benchmark")
    ceilings: Ceilings
    results: list[CaseRecord] = Field(default_factory=list)

    def settle(self) -> None:
        """Recompute floors and ratios from the current ceilings."""
        for record in self.results:
            record.floor_seconds = record.work.floor_seconds(self.ceilings)
            for measurement in record.candidates.values():
                floor = record.floor_seconds
                measurement.over_floor = measurement.median / floor if floor else None

    def write(self, path: Path) -> None:
        """Settle and write, atomically; called after every case."""
        self.settle()
        with atomic_file(path) as temporary:
            Path(temporary).write_text(self.model_dump_json(indent=1, exclude_none=True) + "\n")


def read(path: Path) -> Document:
    """Read and validate a document.

    Raises:
        ValidationError: It is not one (pydantic's, with the path of each fault in the file).
    """
    return Document.model_validate(json.loads(path.read_text()))


def line(record: CaseRecord) -> str:
    """One line about one case, for the terminal."""
    head = f"{record.benchmark}: {record.case}"
    if record.status != "ok":
        return f"{head}: {record.status}: {record.reason}"
    parts = []
    for name, measured in record.candidates.items():
        text = f"{name} {format_seconds(measured.median)}"
        if measured.over_floor:
            text += f" = {measured.over_floor:.3g} x floor"
        if record.amount:
            text += f" ({record.amount / measured.median:.4g} {record.unit}/s)"
        if measured.peak_bytes is not None:
            text += f" peak {measured.peak_bytes / 1e6:.4g} MB"
        if "peak / weights" in measured.extra:
            text += f" = {measured.extra['peak / weights']:.3f} x weights"
        if name in record.speedup:
            text += f" [x{record.speedup[name]:.2f}"
            text += f", x{record.cpu_speedup[name]:.2f} of processor time]" if name in record.cpu_speedup else "]"
        parts.append(text)
    return f"{head}: " + ", ".join(parts) + (f" ({record.reason})" if record.reason else "")


def format_seconds(seconds: float) -> str:
    """1.234 s, 5.67 ms, 8.9 us."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"
