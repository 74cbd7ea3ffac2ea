"""The commands and Python blocks of each door's page run in order, as a reader would type them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = {"peft.md": "peft", "transformers.md": "transformers"}  # page -> the package that it needs


def test_every_page_is_listed() -> None:
    assert {path.name for path in (ROOT / "docs" / "integrations").glob("*.md")} == PAGES.keys()
    table = (ROOT / "docs" / "integrations.md").read_text()
    assert all(f"integrations/{page}" in table for page in PAGES)


@pytest.mark.integration
@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page: str, tmp_path: Path) -> None:
    pytest.importorskip(PAGES[page])
    shutil.copy(ROOT / "docs" / "images" / "nano_scene.png", tmp_path / "scene.png")
    script = tmp_path / "page.py"
    python: list[str] = []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    for language, text in BLOCK.findall((ROOT / "docs" / "integrations" / page).read_text()):
        if language == "python":
            python.append(text)
            continue
        for line in text.replace("\\\n", " ").splitlines():
            if line.startswith("sphinxkit "):  # pip install is for the reader
                command = [sys.executable, "-m", *line.split()]
                subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=240)
    script.write_text("\n".join(python))
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()
    print(done.stdout)  # noqa: T201 - seen with -s
