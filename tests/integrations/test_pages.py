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
PAGES = {  # page -> the package that it needs
    "lmms_eval.md": "lmms_eval",
    "peft.md": "peft",
    "transformers.md": "transformers",
    "trl.md": "trl",
}
TIMEOUT = 600  # seconds a command; lmms-eval and vLLM take one to two minutes to start on two busy cores
PROGRAMS = {
    "sphinxkit": "sphinxkit",
    "lmms-eval": "lmms_eval",
    "vllm": "vllm.entrypoints.cli.main",
}  # command -> module


def test_every_page_is_listed() -> None:
    assert {path.name for path in (ROOT / "docs" / "integrations").glob("*.md")} == PAGES.keys()
    table = (ROOT / "docs" / "integrations.md").read_text()
    assert all(f"integrations/{page}" in table for page in PAGES)


@pytest.mark.integration
@pytest.mark.timeout(3 * TIMEOUT)
@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page: str, tmp_path: Path) -> None:
    pytest.importorskip(PAGES[page])
    shutil.copy(ROOT / "docs" / "images" / "nano_scene.png", tmp_path / "scene.png")
    python: list[str] = []
    shown = ""
    for language, text in BLOCK.findall((ROOT / "docs" / "integrations" / page).read_text()):
        if language == "python":
            python.append(text)
            continue
        lines = text.replace("\\\n", " ").splitlines()
        for line in lines:
            program, *arguments = line.split()
            if program in PROGRAMS:  # pip install is for the reader
                shown += _run(tmp_path, python)
                python.clear()
                _run(tmp_path, [], "-m", PROGRAMS[program], *arguments)
    shown += _run(tmp_path, python)
    assert shown.strip()
    print(shown)  # noqa: T201 - seen with -s


def _run(folder: Path, python: list[str], *command: str) -> str:
    """What a script of blocks, or a program, printed."""
    if not python and not command:
        return ""
    (folder / "page.py").write_text("\n".join(python))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *(command or ["page.py"])],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
