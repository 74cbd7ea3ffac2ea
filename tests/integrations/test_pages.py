"""The commands and Python blocks of each door's page run in order, as a reader would type them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = {  # page -> the package that it needs
    "lmms_eval.md": "lmms_eval",
    "peft.md": "peft",
    "transformers.md": "transformers",
    "trl.md": "trl",
    "vllm.md": "vllm",
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
def test_page_runs(page: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
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
            program, *arguments = shlex.split(line)
            if program in PROGRAMS:  # pip install is for the reader
                shown += _run(tmp_path, python)
                python.clear()
                command = ("-m", PROGRAMS[program], *arguments)
                if arguments[-1] == "&":
                    server = subprocess.Popen([sys.executable, *command[:-1]], cwd=tmp_path, env=ENVIRONMENT)
                    request.addfinalizer(server.terminate)
                else:
                    _run(tmp_path, [], *command)
    shown += _run(tmp_path, python)
    assert shown.strip()
    print(shown)  # noqa: T201 - seen with -s


def _run(folder: Path, python: list[str], *command: str) -> str:
    """What a script of blocks, or a program, printed."""
    if not python and not command:
        return ""
    (folder / "page.py").write_text("\n".join(python))
    done = subprocess.run(
        [sys.executable, *(command or ["page.py"])],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
