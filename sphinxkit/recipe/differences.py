"""Compares two models: ``sphinxkit.diff``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from sphinxkit.interpolation.diff import DiffReport, compare
from sphinxkit.interpolation.plots import need_matplotlib, plot_diff
from sphinxkit.recipe.open_checkpoints import open_all
from sphinxkit.recipe.other_models import renamed_sources


def diff(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    *,
    plot: str | os.PathLike[str] | None = None,
    rename: str | Mapping[str, str] | None = None,
) -> DiffReport:
    """Measure the distance of two models, tensor by tensor, in float64 and constant memory.

    Args:
        first: Directory of a checkpoint, or ``hf://org/repo``; relative distances refer to it.
        second: The same.
        plot: PNG with a heat map of the layers to draw.
        rename: Prefixes of the second model's names and what replaces them, or ``"llm_into_vlm"``; as in
            ``sphinxkit.mix``.
    Raises:
        CheckpointError: One of them cannot be opened.
        DataError: matplotlib is missing, or there is nothing to draw.
    """
    if plot is not None:
        need_matplotlib()
    with ExitStack() as stack:
        report = compare(*renamed_sources(rename, open_all([first, second], stack, by_name=rename is not None)))
    if plot is not None:
        names = [Path(model).name or str(model) for model in (first, second)]
        plot_diff(report, Path(plot), first=names[0], second=names[1])
    return report
