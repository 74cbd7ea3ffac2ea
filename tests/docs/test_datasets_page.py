from __future__ import annotations

import re
from pathlib import Path

from sphinxkit.data.converters import FORMATS
from sphinxkit.evaluation import benchmarks
from sphinxkit.formatters.tasks import BOX_FORMATS

DOCS = Path(__file__).parents[2] / "docs"
TRAINING = (DOCS / "datasets.md").read_text(encoding="utf-8")
_, BENCHMARKS, BOXES = re.split("## Benchmarks|### Boxes of other models", (DOCS / "evaluating.md").read_text("utf-8"))


def test_the_table_names_every_format_and_its_tasks() -> None:
    rows = [row.split("|") for row in TRAINING.splitlines() if row.startswith("| ")]
    table = {name: row for row in rows for name in re.findall(r"`(\w+)`", row[3])}
    assert set(table) == set(FORMATS)
    for name, converters in FORMATS.items():
        if "*" not in converters:
            assert set(converters) <= set(re.findall(r"`(\w+)`", table[name][4])), name


def test_the_benchmarks_of_the_table_exist() -> None:
    rows = [row.split("|") for row in BENCHMARKS.splitlines() if row.startswith("| ")]
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row[2])]
    assert len(names) > 20
    assert [benchmarks.get(name).name for name in names] == names


def test_the_table_of_box_formats_is_complete() -> None:
    rows = [row.split("|") for row in BOXES.splitlines() if row.startswith("| ")]
    assert [name for row in rows for name in re.findall(r"`(\w+)`", row[1])] == list(BOX_FORMATS)
