"""The how-to scripts run as they stand."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import sphinxkit
from sphinxkit import encoders

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
VLM, MIX, ENCODER = (DOCS / "howto" / f"{name}.py" for name in ("your_own_vlm", "mix_two_models", "your_encoder"))
SCRIPTS = sorted((DOCS / "howto").glob("*.py"))


def test_there_are_scripts() -> None:
    assert len(SCRIPTS) >= 3


@pytest.mark.parametrize("script", [path for path in SCRIPTS if path not in (VLM, MIX)], ids=lambda path: path.stem)
def test_script_runs_and_says_something(
    script: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "transformers" in script.read_text():
        pytest.importorskip("transformers")
    monkeypatch.setattr(encoders.registry, "_builders", dict(encoders.registry._builders))
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_your_encoder_is_short() -> None:
    assert len(ENCODER.read_text().splitlines()) <= 30


@pytest.mark.parametrize("steps", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_your_own_vlm(
    steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss falls in a few steps; after the 200 that the page has, it writes words."""
    monkeypatch.chdir(tmp_path)
    text = VLM.read_text()
    assert len(text.splitlines()) <= 15
    assert '"steps": 200' in text
    script = tmp_path / "script.py"
    script.write_text(text.replace('"steps": 200', f'"steps": {steps}, "device": "cpu", "num_workers": 0'))
    runpy.run_path(str(script), run_name="__main__")
    found = re.search(r"loss (\S+) -> (\S+); it says (.*)", capsys.readouterr().out)
    assert found is not None
    assert float(found[2]) < float(found[1]) * (1 if steps < 200 else 0.3)
    assert steps < 200 or re.search("[A-Za-z]{3}", found[3])


@pytest.mark.slow
def test_two_models_are_tuned_and_the_best_mix_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "script.py"
    text = MIX.read_text()
    for old, new in (("STEPS = 20", "STEPS = 2"), ("range(12)", "range(2)"), ('"dtype"', '"device": "cpu", "dtype"')):
        assert old in text
        text = text.replace(old, new)
    script.write_text(text)
    runpy.run_path(str(script), run_name="__main__")
    said = capsys.readouterr().out
    losses = {beta: float(loss) for beta, loss in re.findall(r"^beta (\S+): loss (\S+)$", said, re.MULTILINE)}
    assert list(losses) == ["0.0", "0.25", "0.5", "0.75", "1.0"]
    assert losses["0.0"] != losses["1.0"]
    best = re.search(r"the best mix is mixed: beta (\S+)", said)
    assert best is not None
    assert losses[best[1]] == min(losses.values())
    assert sphinxkit.load("mixed").recipe_yaml


def test_your_own_vlm_stands_in_the_readme() -> None:
    assert VLM.read_text() in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script_is_shown_on_the_site(script: Path) -> None:
    pages = "".join(page.read_text() for page in (DOCS / "tutorials").glob("*.md"))
    assert f"howto/{script.name}" in pages
