"""The how-to scripts run as they stand."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "docs" / "howto").glob("*.py"))


def test_there_are_scripts() -> None:
    assert len(SCRIPTS) >= 3


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script_runs_and_says_something(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "transformers" in script.read_text():
        pytest.importorskip("transformers")
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script_is_shown_on_the_site(script: Path) -> None:
    assert f"howto/{script.name}" in (ROOT / "docs" / "howto.md").read_text()
