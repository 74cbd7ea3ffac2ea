"""Plots of sweeps and diffs as PNG files; needs matplotlib (``pip install "sphinxkit[plot]"``)."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

from sphinxkit.atomic import atomic_file, named_errors
from sphinxkit.errors import DataError
from sphinxkit.interpolation.diff import DiffReport, heat_map
from sphinxkit.interpolation.sweep import SweepResult

_DPI = 150  # our choice


def need_matplotlib() -> None:
    """Say what to install if matplotlib is missing, before any work is done.

    Raises:
        DataError: It is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise DataError('a plot needs matplotlib: pip install "sphinxkit[plot]"')


def _figure(width: float, height: float) -> Any:
    need_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # draws to a file without a display and without matplotlib's global state
    return figure


def _save(figure: Any, path: Path) -> None:
    with named_errors(path), atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=_DPI)


def plot_sweep(result: SweepResult, path: str | Path, *, first: str = "first", second: str = "second") -> Path:
    """Draw score against beta, with the end points and the best mix marked.

    Args:
        result: The sweep.
        path: PNG file to write.
        first: Name of the model at beta 1.
        second: Name of the model at beta 0.
    Raises:
        DataError: matplotlib is missing.
    """
    figure = _figure(6.4, 4.0)
    axes = figure.subplots()
    points = sorted(result.points, key=lambda point: point.beta)
    axes.plot([p.beta for p in points], [p.score for p in points], color="0.35", marker="o", markersize=3, zorder=1)
    for beta, name, marker in ((0.0, second, "s"), (1.0, first, "D")):
        end = result.end_point(beta)
        if end:
            axes.scatter([end.beta], [end.score], marker=marker, s=60, zorder=2, label=f"{name} alone (beta {beta:g})")
    best = result.best
    axes.scatter(
        [best.beta], [best.score], marker="*", s=160, zorder=3, label=f"best: {best.score:.4g} at {best.beta:g}"
    )
    axes.set_xlabel(f"beta, the weight of {first}")
    axes.set_ylabel("score (lower is better)" if result.minimize else "score (higher is better)")
    axes.legend()
    _save(figure, Path(path))
    return Path(path)


def plot_diff(report: DiffReport, path: str | Path, *, first: str = "first", second: str = "second") -> Path:
    """Draw the relative L2 distance of every tensor in a layer as one heat map per stack of layers.

    Models without layers get a bar per module instead.

    Args:
        report: The distances.
        path: PNG file to write.
        first: Name of the model that distances are relative to.
        second: Name of the other.
    Raises:
        DataError: matplotlib is missing, or there is nothing to draw.
    """
    tables = heat_map(report.tensors)
    if not report.tensors:
        raise DataError("the models have no tensor in common, so there is nothing to draw")
    if not tables:
        figure = _figure(8, 1 + 0.25 * len(report.layers))
        axes = figure.subplots()
        axes.barh([layer.name for layer in report.layers], [layer.relative_l2 for layer in report.layers])
        axes.set_xlabel("relative L2 distance")
        _save(figure, Path(path))
        return Path(path)
    heights = [1.0 + 0.22 * len(rows) for rows, _, _ in tables.values()]
    widest = max(len(numbers) for _, numbers, _ in tables.values())
    figure = _figure(min(24.0, 5.0 + 0.28 * widest), sum(heights))
    finite = [v for _, _, values in tables.values() for row in values for v in row if math.isfinite(v)]
    largest = max(finite, default=0.0) or 1.0
    panels = figure.subplots(len(tables), 1, squeeze=False, height_ratios=heights)
    for (stack, (rows, numbers, values)), (axes,) in zip(tables.items(), panels, strict=True):
        image = axes.imshow(values, aspect="auto", vmin=0.0, vmax=largest, cmap="viridis", interpolation="nearest")
        axes.set_title(stack, fontsize=8, loc="left")
        axes.set_yticks(range(len(rows)), rows, fontsize=6)
        step = max(1, len(numbers) // 20)
        axes.set_xticks(range(0, len(numbers), step), [str(number) for number in numbers[::step]], fontsize=6)
    figure.colorbar(image, ax=panels[:, 0], label="relative L2 distance", fraction=0.03)
    figure.suptitle(f"{second} against {first}, layer by layer", fontsize=9)
    _save(figure, Path(path))
    return Path(path)
