"""docs/nano.md: its tables are those of the recipes and of the scores."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from sphinxkit.nano.perception.training import PerceptionPlan
from sphinxkit.recipe import shipped_folder

DOCS = shipped_folder().parent / "docs"
pytestmark = pytest.mark.skipif(not (DOCS / "nano.md").exists(), reason="not a checkout")


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "nano_page.py"))


def cells(text: str, name: str) -> list[list[str]]:
    """The rows of the table between markers, without its head."""
    table = text.partition(f"<!-- {name}: begin -->")[2].partition(f"<!-- {name}: end -->")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]


def test_the_stages_are_the_recipes(script: dict[str, Any]) -> None:
    rows = {row[0]: row[1:3] for row in cells((DOCS / "nano.md").read_text(), "stages")}
    plan = PerceptionPlan()
    expected = {"encoders": [f"{plan.steps:,}", f"{plan.steps * plan.batch_size:,} views"]}
    for name, stage in script["trained_stages"]():
        count = stage.steps * sum(stream.batch_size for stream in stage.data.values())
        expected[name] = [f"{stage.steps:,}", f"{count:,}"]
    assert rows == expected, "run python docs/nano_page.py"


def test_the_scores_are_those_of_the_file(script: dict[str, Any]) -> None:
    text = (DOCS / "nano.md").read_text()
    for name, path in script["SCORES"].items():
        assert script["updated"](text, name, script["scores"](path)) == text, "run python docs/nano_page.py"


def test_scores_come_from_the_file(tmp_path: Path) -> None:
    script = runpy.run_path(str(DOCS / "nano_page.py"))
    path = tmp_path / "nano_scores.json"
    assert script["scores"](path) == "Not scored yet: there is no `docs/nano_scores.json`."
    row = {"goal": 0.9, "model": 0.5, "blind": 0.1, "majority": 0.2}
    path.write_text(json.dumps({"rows": {"VQA": row}}))
    assert script["scores"](path).endswith("| VQA | 0.90 | 0.500 | 0.100 | 0.200 |")
    assert cells(
        script["updated"]("<!-- scores: begin --><!-- scores: end -->", "scores", script["scores"](path)), "scores"
    )


def test_markers_are_needed(script: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected <!-- scores: begin --> and <!-- scores: end --> once each"):
        script["updated"]("<!-- scores: end -->", "scores", "")
