"""Documents to RESULTS.md and plots."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks import results
from benchmarks.harness import OURS
from benchmarks.results import CaseRecord, Document, Measurement, format_seconds

RATES = (("copy_bandwidth", "memory copy"), ("read_bandwidth", "memory read"), ("disk_read", "disk read, cold"),
         ("disk_write", "disk write, synced"), ("disk_copy", "disk copy, cold"))  # fmt: skip
PREAMBLE = """# Benchmark results

Written by `python -m benchmarks table` from the JSON documents in `benchmarks/results/`; do not edit by hand.
How to read it: every case ran its candidates interleaved in one process, times are medians with quartiles.
*floor* is the time that the counted work needs at the ceilings measured in the same run (memory, matrix products,
disk: the longest); *x floor* is measured over floor. *speed-up* is the competitor's time over ours, the median over
the rounds: above 1 ours is faster; in brackets the same of processor times (all threads), which other work on the
machine disturbs less. Times of different documents are not comparable.
"""


def write(paths: Sequence[Path], out: Path) -> list[Path]:
    """Render documents, newest first, into ``out`` and one plot per document beside it.

    Args:
        paths: JSON documents; an invalid one raises.
        out: Markdown file.
    Returns:
        The files written.
    """
    documents = sorted(((path, results.read(path)) for path in paths), key=lambda pair: pair[1].date, reverse=True)
    text, written = [PREAMBLE], [out]
    if not any(document.device == "cuda" and not document.micro for _, document in documents):
        text.append("## CUDA\n\nNot yet run on CUDA.\n")
    for path, document in documents:
        plot = _plot(document, out.parent / "plots" / f"{path.stem}.svg")
        text.append(_section(path, document))
        if plot is not None:
            written.append(plot)
            text.append(f"![times over their floors]({os.path.relpath(plot, out.parent)})\n")
    out.write_text("\n".join(text))
    return written


def summary(document: Document) -> list[str]:
    """A table for the terminal: each case's candidates with measured time, floor and their ratio."""
    rows = [("case", "candidate", "measured", "floor", "measured / floor")]
    for record in document.results:
        label, floor = f"{record.benchmark}: {record.case}", record.floor_seconds
        if record.status != "ok":
            rows.append((label, f"{record.status}: {record.reason}", "", "", ""))
        for name, measured in record.candidates.items():
            ratio = f"{measured.over_floor:.3g}" if measured.over_floor else ""
            floor_text = format_seconds(floor) if floor else ""
            rows.append((label, name, format_seconds(measured.median), floor_text, ratio))
            label = ""
    widths = [min(100, max(len(row[column]) for row in rows)) for column in range(5)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _rate(value: float) -> str:
    return f"{value / 1e12:.3g} T" if value >= 1e12 else f"{value / 1e9:.3g} G"


def _section(path: Path, document: Document) -> str:
    machine = document.machine
    name = machine.get("gpu") or machine.get("cpu", "")
    lines = [f"## {document.device.upper()}: {document.date[:10]}, `{path.name}`", ""]
    if document.micro:
        lines += ["**Micro sizes: these numbers mean nothing.**", ""]
    if document.quick:
        lines += ["**Quick sizes: a first look, not for comparison.**", ""]
    if document.note:
        lines += [document.note, ""]
    versions = ", ".join(f"{package} {version}" for package, version in document.versions.items())
    load = document.load_average
    facts = ", ".join(f"{key} {value}" for key, value in machine.items() if key in ("cores", "threads", "cuda"))
    lines += [
        f"{name}; {facts}; load average {min(load):.1f} to {max(load):.1f}; commit {document.commit or 'unknown'}.",
        f"{versions}." + ("" if document.finished else " The run did not finish."),
        "",
        "| ceiling | rate |",
        "|---|---|",
    ]
    for field, label in RATES:
        rate = getattr(document.ceilings, field)
        if rate is not None:
            lines.append(f"| {label} | {_rate(rate)}B/s |")
    lines += [f"| matmul {dtype} | {_rate(rate)}FLOP/s |" for dtype, rate in document.ceilings.matmul.items()]
    lines.append("")
    for benchmark in dict.fromkeys(record.benchmark for record in document.results):
        lines += _benchmark(benchmark, [record for record in document.results if record.benchmark == benchmark])
    return "\n".join(lines)


def _benchmark(name: str, records: list[CaseRecord]) -> list[str]:
    measured = [record for record in records if record.candidates]
    lines = [f"### {name}", ""]
    if measured:
        lines += [
            "| case | candidate | median (quartiles) | rate | x floor | processor time | speed-up (processor time) "
            "| peak memory | more |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for record in measured:
            lines += [_row(record, candidate, measure) for candidate, measure in record.candidates.items()]
        lines.append("")
    others = [record for record in records if record.reason]
    lines += [f"- {record.case}: {record.status}: {record.reason}" for record in others]
    return [*lines, ""] if others else lines


def _row(record: CaseRecord, candidate: str, measured: Measurement) -> str:
    low, high = format_seconds(measured.low), format_seconds(measured.high)
    speedup = f"{record.speedup[candidate]:.2f}" if candidate in record.speedup else ""
    if candidate in record.cpu_speedup:
        speedup += f" ({record.cpu_speedup[candidate]:.2f})"
    cells = [
        record.case if candidate == next(iter(record.candidates)) else "",
        f"**{candidate}**" if candidate == OURS else candidate,
        f"{format_seconds(measured.median)} ({low} to {high})",
        f"{record.amount / measured.median:.4g} {record.unit}/s" if record.amount else "",
        f"{measured.over_floor:.3g}" if measured.over_floor else "",
        format_seconds(measured.cpu) if measured.cpu else "",
        speedup,
        f"{measured.peak_bytes / 1e6:.4g} MB" if measured.peak_bytes is not None else "",
        ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in measured.extra.items()
        ),
    ]
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _plot(document: Document, path: Path) -> Path | None:
    """Bars of measured over floor, ours and the competitors'; None without matplotlib or without floors."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        return None
    rows = [
        (f"{record.benchmark}: {record.case}", candidate, measured.over_floor)
        for record in document.results
        for candidate, measured in record.candidates.items()
        if measured.over_floor
    ]
    if not rows:
        return None
    mpl.rcParams.update({"svg.hashsalt": "sphinxkit", "svg.fonttype": "none"})  # reproducible files, text as text
    figure = Figure(figsize=(9, 1.2 + 0.22 * len(rows)))
    axes = figure.subplots()
    labels = [f"{case} | {candidate}" for case, candidate, _ in rows]
    colours = ["tab:blue" if candidate == OURS else "tab:gray" for _, candidate, _ in rows]
    axes.barh(range(len(rows)), [value for _, _, value in rows], color=colours)
    axes.set_yticks(range(len(rows)), labels, fontsize=6)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("measured time / floor (1 = the machine's limit in this run)")
    axes.set_title(f"{document.device}, {document.date[:10]}", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    return path
