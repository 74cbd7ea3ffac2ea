"""The table of checkpoint formats agrees with the registry."""

from __future__ import annotations

import re
from pathlib import Path

from sphinxkit.checkpoint import formats

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "formats.md").read_text()
LINES = [line.split("|") for line in PAGE.splitlines() if line.startswith("| `") and "`--to`" not in line]
ROWS = {re.findall(r"`(\w+)`", cells[1])[-1]: cells for cells in LINES}


def test_every_format_is_in_the_table() -> None:
    ours = [name for name in formats.names() if formats.registry.get(name).__module__.startswith("sphinxkit.")]
    assert sorted(ROWS) == sorted(ours)


def test_what_a_format_holds_is_what_its_class_says() -> None:
    for name, cells in ROWS.items():
        found = formats.get_format(name)
        assert ("the language model" in cells[3]) == found.is_text_only, name
        assert ("--shards" in cells[4]) == found.has_shards, name
