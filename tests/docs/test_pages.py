"""The Python blocks of the pages run, in order, as a reader would type them."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sphinxkit import checkpoint, encoders, interpolation, llama, mixers, projectors
from sphinxkit.cli import app

DOCS = Path(__file__).resolve().parents[2] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = re.compile(r"^```(python|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)
RUN = ["plugins.md", "recipes.md", "components.md", "mixing.md", "training.md"]
WITH_NANO = ["quick_start.md", "evaluating.md"]  # what index.md costs beyond the default run's share
MAX_LINES = 50  # adding a component is promised to take less


def blocks(page: str) -> list[str]:
    return BLOCK.findall((DOCS / page).read_text())


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registries that forget what a page registers."""
    parts = (checkpoint.formats, encoders, interpolation, llama, mixers, projectors)
    for registry in (part.registry for part in parts):
        monkeypatch.setattr(registry, "_builders", dict(registry._builders))


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("page", [*RUN, pytest.param("nano_world.md", marks=pytest.mark.slow)])
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = blocks(page)
    assert found
    scope: dict[str, object] = {"__name__": f"docs_{Path(page).stem}"}
    for block in found:
        exec(compile(block, page, "exec"), scope)


@pytest.mark.parametrize("page", ["index.md", *(pytest.param(page, marks=pytest.mark.slow) for page in WITH_NANO)])
def test_pages_with_the_model_in_the_package_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(DOCS / "images" / "nano_scene.png", "scene.png")
    scope: dict[str, object] = {"__name__": f"docs_{Path(page).stem}"}
    said = ""
    for language, block in BLOCKS.findall((DOCS / page).read_text()):
        if language == "python":
            exec(compile(block, page, "exec"), scope)
            said += capsys.readouterr().out
            continue
        for line in block.splitlines():
            done = CliRunner().invoke(app, shlex.split(line)[1:])
            assert done.exit_code == 0, f"{line}: {done.output}"
            said += done.stdout
    assert "2" in said.splitlines() or page == "evaluating.md"  # the shapes in the scene
    assert said.strip()


def test_every_plugin_example_is_short() -> None:
    assert all(len(block.splitlines()) < MAX_LINES for block in blocks("plugins.md"))


def test_recipes_page_shows_the_shipped_recipe() -> None:
    import yaml

    shown = re.search(r"^```yaml\n(.*?)^```", (DOCS / "recipes.md").read_text(), re.MULTILINE | re.DOTALL)
    assert shown is not None
    shipped = (DOCS.parent / "recipes" / "sphinx_1k_13b.yaml").read_text()
    assert yaml.safe_load(shown.group(1)) == yaml.safe_load(shipped)


@pytest.mark.slow
def test_recipes_page_lists_every_shipped_recipe_with_its_image_tokens() -> None:
    import sphinxkit
    from sphinxkit.recipe import shipped_recipes

    text = (DOCS / "recipes.md").read_text()
    models = [name for name in shipped_recipes() if sphinxkit.Recipe.find(name).kind == "model"]
    missing = [name for name in models if f"`{name}`" not in text]
    assert not missing
    for name in models:
        [row] = [line for line in text.splitlines() if line.startswith("|") and f"`{name}`" in line]
        stated = int(row.split("|")[4])
        assert sphinxkit.build(name, device="meta").vision.num_tokens == stated, name
