from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from sphinxkit import checkpoint
from sphinxkit.atomic import TEMP_SUFFIX
from sphinxkit.checkpoint import MappingSource
from sphinxkit.errors import CheckpointError
from sphinxkit.tensor_source import TensorSource

FORMATS = [name for name in checkpoint.formats.names() if checkpoint.formats.get_format(name).is_canonical]
Model = tuple[MappingSource, dict[str, Any]]


@pytest.mark.parametrize("format", FORMATS)
def test_formats_are_told_apart(tmp_path: Path, text_model: Model, format: str) -> None:
    source, recipe = text_model
    folder = checkpoint.save(tmp_path / "model", source, format=format, recipe=recipe)
    assert checkpoint.detect(folder) == [format]
    with checkpoint.open(str(folder)) as opened:
        assert opened.format == format
        assert isinstance(opened, TensorSource)
    with checkpoint.open(folder, format=format) as opened:
        assert opened.format == format


def test_several_formats_in_one_folder(tmp_path: Path, text_model: Model) -> None:
    source, recipe = text_model
    folder = checkpoint.save(tmp_path / "model", source, format="meta", recipe=recipe)
    other = checkpoint.save(tmp_path / "other", source, format="hf", recipe=recipe)
    for path in other.iterdir():
        shutil.copy(path, folder)
    with pytest.raises(CheckpointError, match=r"several formats; pass format= one of \['hf', 'meta'\]"):
        checkpoint.open(folder)
    for format in ("meta", "hf"):
        with checkpoint.open(folder, format=format) as opened:
            assert opened.format == format


def test_nothing_to_open(tmp_path: Path, text_model: Model) -> None:
    with pytest.raises(CheckpointError, match="there is no such folder"):
        checkpoint.open(tmp_path / "none")
    with pytest.raises(CheckpointError, match="nan: there is no such folder; did you mean 'nano'?"):
        checkpoint.open("nan")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"no checkpoint in it. Expected .*found notes.txt"):
        checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match=r"notes.txt: is a file; give the folder"):
        checkpoint.open(tmp_path / "notes.txt")
    (tmp_path / "scene.png").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"scene.png: is a file; a picture goes into image="):
        checkpoint.open(tmp_path / "scene.png")
    with pytest.raises(CheckpointError, match="is not in sphinxkit's own format"):
        checkpoint.open(tmp_path, format="sphinxkit")
    with pytest.raises(CheckpointError, match="replicas='last': expected 'equal' or 'first'"):
        checkpoint.open(tmp_path, replicas="last")  # type: ignore[arg-type]
    with pytest.raises(
        CheckpointError, match="format 'gguf'; known: hf, hf_sphinx, meta, safetensors, sphinx, sphinxkit"
    ):
        checkpoint.open(tmp_path, format="gguf")


def test_a_folder_that_a_killed_writer_moved_aside_is_found_and_nothing_is_removed(
    tmp_path: Path, text_model: Model
) -> None:
    source, _ = text_model
    folder = checkpoint.save(tmp_path / "model", source)
    folder.rename(tmp_path / f".model.{'0' * 16}-old{TEMP_SUFFIX}")
    half = tmp_path / f".model.{'1' * 16}{TEMP_SUFFIX}"
    half.mkdir()
    with checkpoint.open(folder) as opened:
        assert len(opened) == len(list(source.keys()))
    assert sorted(tmp_path.iterdir()) == [half, folder]
