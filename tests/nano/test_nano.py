from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sphinxkit
from sphinxkit import nano
from sphinxkit.errors import CheckpointError

FILES = ("recipe.yaml", "tokenizer.model", "model.safetensors.index.json", "model.safetensors")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Takes the place of the folder in the package."""
    monkeypatch.setattr("sphinxkit.hub._NANO_FOLDER", tmp_path)
    return tmp_path


def test_the_checkpoint_lies_in_the_package() -> None:
    folder = Path(sphinxkit.__file__).parent / "nano" / "weights"
    if folder.is_dir():
        assert nano.path() == folder
    else:
        with pytest.raises(CheckpointError) as caught:
            nano.path()
        assert str(caught.value).startswith(f"{folder}: this installation comes without")


@pytest.mark.parametrize("missing", FILES)
def test_a_missing_file_is_named(folder: Path, missing: str) -> None:
    for name in FILES:
        (folder / name).touch()
    assert nano.path() == folder
    (folder / missing).unlink()
    shown = "*.safetensors" if missing == "model.safetensors" else missing
    with pytest.raises(CheckpointError) as caught:
        nano.path()
    assert f"without SPHINX-nano's weights (missing: {shown}); name another checkpoint" in str(caught.value)


def test_load(folder: Path) -> None:
    model = sphinxkit.build("sphinx_micro", dtype=torch.bfloat16)
    model.save(folder, overwrite=True)
    loaded = nano.load(dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert not loaded.training
    ids = torch.tensor([[1, 5, 9]])
    assert torch.equal(loaded(ids), model.eval()(ids))
