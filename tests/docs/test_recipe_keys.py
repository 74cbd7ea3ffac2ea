"""The page of recipe keys has every key, with its meaning."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from sphinxkit.training.plan import TrainPlan

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "recipe_keys.py"


@pytest.fixture(scope="module")
def page() -> str:
    return str(runpy.run_path(str(SCRIPT))["page"]())


def test_every_key_has_a_meaning(page: str) -> None:
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 150
    assert [row for row in rows if row.endswith("|  |")] == []


def test_defaults_and_types_are_the_schemas(page: str) -> None:
    assert f"| `pack_tokens` | int | `{TrainPlan.pack_tokens}` | Tokens of a packed row. |" in page
    assert "| `dtype` | `bfloat16` or `float32` | `bfloat16` |" in page
    assert "| `llm` | component | required |" in page
    assert "### `encoders`: `clip_vit_large_patch14`" in page
    assert "embed_dims" not in page  # filled in by assembly
