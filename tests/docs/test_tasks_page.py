"""The page of tasks: what it shows is what the code does now."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sphinxkit.evaluation import benchmarks
from sphinxkit.formatters import tasks

DOCS = Path(__file__).resolve().parents[2] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
MAX_LINES = 50  # adding a task is promised to take less
MAX_BYTES = 600_000  # of all pictures together
# Mean difference of a pixel's channels, of 255: another version of Pillow may smooth letters and edges otherwise.
PICTURE_ATOL = 2.0


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "tasks_page.py"))


def test_page_is_current(script: dict[str, Any]) -> None:
    assert script["page"]() == (DOCS / "tasks.md").read_text(), "run python docs/tasks_page.py: docs/tasks.md is old"


def test_every_task_is_shown_once(script: dict[str, Any]) -> None:
    shown = [case.task for case in script["CASES"]]
    ours = [name for name in tasks.names() if tasks.registry.get(name).__module__.startswith("sphinxkit.")]
    assert sorted(shown) == ours


def test_pictures_are_current_and_small(script: dict[str, Any]) -> None:
    folder = DOCS / "_static" / "tasks"
    assert {path.stem for path in folder.iterdir()} == {case.task for case in script["CASES"]}
    assert sum(path.stat().st_size for path in folder.iterdir()) < MAX_BYTES
    for case in script["CASES"]:
        with Image.open(folder / f"{case.task}.png") as stored:
            old = np.asarray(stored.convert("RGB"), dtype=np.float32)
        new = np.asarray(script["drawn"](case).convert("RGB"), dtype=np.float32)
        assert old.shape == new.shape
        assert np.abs(old - new).mean() < PICTURE_ATOL, f"run python docs/tasks_page.py: {case.task}.png is old"


def test_a_picture_says_what_its_answer_says(script: dict[str, Any]) -> None:
    """Where the drawn box is, the picture differs from the bare one, and nowhere else."""
    [case] = [case for case in script["CASES"] if case.task == "rec"]
    bare = np.asarray(script["pictures"].scene(), dtype=np.float32)
    drawn = np.asarray(script["drawn"](case).convert("RGB"), dtype=np.float32)
    changed = np.abs(drawn - bare).max(axis=2) > 100  # more than a palette of 256 colours moves a pixel
    ys, xs = np.nonzero(changed)
    box = case.sample.box
    assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == pytest.approx((box.x1, box.y1, box.x2, box.y2), abs=1)


@pytest.mark.parametrize("name", ["rec", "reg", "pose", "detection", "text_detection", "relation", "layout"])
def test_examples_come_back(script: dict[str, Any], name: str) -> None:
    [case] = [case for case in script["CASES"] if case.task == name]
    task = tasks.create(name)
    geometry = script["ImageGeometry"](*script["pictures"].PICTURES[case.picture]().size)
    result = task.parse(task.format(case.sample).answer, geometry)
    assert result.is_strict
    assert len(result.items) == len(task.items(case.sample))


def test_python_blocks_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.registry, "_builders", dict(tasks.registry._builders))
    blocks = BLOCK.findall((DOCS / "tasks.md").read_text())
    assert len(blocks) == 2
    scope: dict[str, Any] = {"__name__": "docs_tasks"}
    for block in blocks:
        assert len(block.splitlines()) < MAX_LINES
        exec(compile(block, "tasks.md", "exec", dont_inherit=True), scope)
    assert benchmarks.get("count").metric == "accuracy"
