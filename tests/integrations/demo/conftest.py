from __future__ import annotations

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
