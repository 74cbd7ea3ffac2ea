from __future__ import annotations

import re
from pathlib import Path

from sphinxkit.data.converters import FORMATS

PAGE = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text(encoding="utf-8")


def test_the_table_names_every_format_and_its_tasks() -> None:
    rows = [row.split("|") for row in PAGE.splitlines() if row.startswith("| ")]
    table = {name: row for row in rows for name in re.findall(r"`(\w+)`", row[3])}
    assert set(table) == set(FORMATS)
    for name, converters in FORMATS.items():
        if "*" not in converters:
            assert set(converters) <= set(re.findall(r"`(\w+)`", table[name][4])), name
