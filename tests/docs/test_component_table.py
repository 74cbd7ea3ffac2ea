from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "component_table.py"))


@pytest.mark.parametrize("path", ["docs/components.md", "README.md"])
def test_table_is_current(script: dict[str, Any], path: str) -> None:
    text = (ROOT / path).read_text()
    if path == "README.md" and script["BEGIN"] not in text:
        pytest.skip("README.md has no component table")
    assert script["updated"](text) == text, f"run python docs/component_table.py: the table in {path} is old"


def test_every_component_has_a_sentence(script: dict[str, Any]) -> None:
    rows = list(script["rows"]())
    assert ("encoder", "clip_vit_large_patch14") in {(family, name) for family, name, _ in rows}
    assert [name for _, name, text in rows if not text] == []


def test_missing_markers_are_an_error(script: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="components: begin"):
        script["updated"]("no table here")


def test_a_plugin_is_not_listed(script: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from sphinxkit import encoders

    monkeypatch.setitem(encoders.registry._builders, "somebody_elses", pytest.fail)
    assert "somebody_elses" not in {name for _, name, _ in script["rows"]()}
