from __future__ import annotations

from pathlib import Path

import pytest

import sphinxkit


@pytest.fixture(scope="session")
def micro(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint in sphinxkit's own layout."""
    folder = tmp_path_factory.mktemp("nano") / "weights"
    sphinxkit.load(golden / "llama_ens").save(folder)
    return folder


@pytest.fixture
def embedded(micro: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small checkpoint in the place of the one that comes with the package."""
    monkeypatch.setattr("sphinxkit.hub._NANO_FOLDER", micro)
    return micro
