from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from sphinxkit.errors import DataError
from sphinxkit.interpolation.diff import compare
from sphinxkit.interpolation.plots import need_matplotlib, plot_diff, plot_sweep
from sphinxkit.interpolation.sweep import SweepPoint, SweepResult
from sphinxkit.tensor_source import MappingSource


def colours(path: Path) -> int:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return len(image.convert("RGB").getcolors(2**24) or [])


def test_sweep_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    points = tuple(SweepPoint(beta / 4, (beta - 2) ** 2) for beta in range(5))
    assert colours(plot_sweep(SweepResult(points, minimize=True), tmp_path / "sweep.png")) > 10
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.png"]


def test_diff_is_drawn(tmp_path: Path, make_model: Callable[..., MappingSource]) -> None:
    pytest.importorskip("matplotlib")
    report = compare(make_model(0), make_model(1))
    assert colours(plot_diff(report, tmp_path / "diff.png")) > 10
    flat = compare(MappingSource({"a.w": torch.ones(2)}), MappingSource({"a.w": torch.zeros(2)}))
    assert colours(plot_diff(flat, tmp_path / "flat.png")) > 1
    with pytest.raises(DataError, match=r"diff.png/a.png: cannot be written: .*(Not a directory|File exists)"):
        plot_diff(flat, tmp_path / "diff.png" / "a.png")


def test_nothing_to_draw(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = compare(MappingSource({"a": torch.ones(2)}), MappingSource({"b": torch.ones(2)}))
    with pytest.raises(DataError, match="nothing to draw"):
        plot_diff(report, tmp_path / "diff.png")


def test_matplotlib_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DataError, match=r"pip install \"sphinxkit\[plot\]\""):
        need_matplotlib()
