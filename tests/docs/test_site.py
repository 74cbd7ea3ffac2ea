from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_site_builds_without_warnings(tmp_path: Path) -> None:
    for module in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(module)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(tmp_path / "trees")]
    done = subprocess.run(
        [*command, str(ROOT / "docs"), str(tmp_path / "html")],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    index = (tmp_path / "html" / "index.html").read_text()
    for page in ("quick_start", "tutorials/mix_two_models", "numerics", "api/recipe_keys", "api/index"):
        assert f'href="{page}.html"' in index
    commands = (tmp_path / "html" / "api" / "command_line.html").read_text()
    assert "sphinxkit generate" in re.sub(r"<[^>]*>", "", commands)  # the site puts a code's words into spans
    assert "ChannelMixer" in (tmp_path / "html" / "api" / "mixers.html").read_text()
