from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

import sphinxkit
from sphinxkit.sphinx_model import SphinxModel


@pytest.fixture(scope="session")
def model(golden: Path) -> SphinxModel:
    return sphinxkit.load(golden / "llama_ens")


@pytest.fixture
def red(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    Image.new("RGB", (200, 100), "red").save(path)
    return path


SERVE = """
import sys

def watch(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][0] not in ("127.0.0.1", "::1"):
        print("asks another machine:", arguments[1], flush=True)

sys.addaudithook(watch)
from sphinxkit.integrations.demo import server
server.MAX_VISITORS = 2
from sphinxkit.cli import main
main()
"""


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """SPHINX-nano's page, served by the command in a process of its own, for two visitors at once."""
    pytest.importorskip("gradio", minversion="6.0", reason="needs gradio: pip install 'sphinxkit[demo]'")
    command = [sys.executable, "-c", SERVE, "demo", "--port", "0", "--device", "cpu", "--dtype", "float32"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[0].rstrip("/")
        finally:
            process.terminate()
            assert process.communicate(timeout=60)[0] == ""  # nothing was asked of another machine
