"""The tables of docs/numerics.md agree with the code."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "numerics.md"
# | what | `value` | `package.module:name` or `package.module:callable(parameter)` | ...
ROW = re.compile(r"^\|[^|]*\| `([^`|]+)` \| `([\w.]+):(\w+)(?:\((\w+)\))?` \|", re.MULTILINE)
ROWS = ROW.findall(PAGE.read_text())


def test_every_table_row_is_read() -> None:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and not line.startswith("| what")]
    assert len(lines) == len(ROWS) >= 40


@pytest.mark.parametrize(("value", "module", "name", "parameter"), ROWS, ids=[f"{row[2]}-{row[3]}" for row in ROWS])
def test_value_is_the_codes(value: str, module: str, name: str, parameter: str) -> None:
    found = getattr(importlib.import_module(module), name)
    if parameter:
        found = inspect.signature(found).parameters[parameter].default
    expected = ast.literal_eval(value)
    assert (tuple(found) if isinstance(expected, tuple) else found) == expected
