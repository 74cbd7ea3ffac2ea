from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sphinxkit import checkpoint
from sphinxkit.checkpoint import MappingSource
from sphinxkit.errors import CheckpointError
from sphinxkit.tensor_files.checksums import file_sha256

Model = tuple[MappingSource, dict[str, Any]]


@pytest.fixture
def folder(tmp_path: Path, text_model: Model) -> Path:
    source, recipe = text_model
    return checkpoint.save(tmp_path / "own", source, recipe=recipe, max_shard_bytes=20_000)


def test_layout(folder: Path, text_model: Model) -> None:
    import yaml
    from safetensors.torch import load_file

    source, recipe = text_model
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-0000{len(files)}.safetensors"
    assert sorted(index["metadata"]["files"]) == [*files, "recipe.yaml"]
    for name, facts in index["metadata"]["files"].items():
        content = (folder / name).read_bytes()
        assert facts == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert file_sha256(folder / name) == facts["sha256"]
    assert index["metadata"]["total_size"] == sum(source.read(key).nbytes for key in source.keys())  # noqa: SIM118
    loaded = {key: name for name in files for key in load_file(folder / name)}
    assert loaded == index["weight_map"]
    assert yaml.safe_load((folder / "recipe.yaml").read_text()) == recipe


def test_reads_what_it_wrote(folder: Path, text_model: Model, same: Callable[..., None]) -> None:
    source, recipe = text_model
    with checkpoint.open(folder, verify=True) as opened:
        assert opened.format == "sphinxkit"
        same(opened, source)
        assert opened.recipe == recipe
        assert len(opened.unused) == 0
        assert opened.tokenizer_path is None


def test_a_changed_byte_is_found_by_its_checksum_and_a_changed_size_always(folder: Path) -> None:
    path = min(folder.glob("model-*.safetensors"))
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    checkpoint.open(folder).close()
    with pytest.raises(
        CheckpointError, match=rf"tampered with; fetch them again:\n  - {path.name} does not match its SHA"
    ):
        checkpoint.open(folder, verify=True)
    path.write_bytes(raw[:-4])
    with pytest.raises(CheckpointError, match=rf"{path.name} has {len(raw) - 4} bytes, the index says {len(raw)}"):
        checkpoint.open(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"files that the index names are missing; fetch them:\n  - {path.name}"):
        checkpoint.open(folder)


def test_without_checksums(tmp_path: Path, text_model: Model) -> None:
    source, _ = text_model
    folder = checkpoint.save(tmp_path / "own", source, checksum=False)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert list(index["metadata"]["files"]["model.safetensors"]) == ["size"]
    with (
        checkpoint.open(folder, verify=True) as opened,
        pytest.raises(CheckpointError, match=r"there is no recipe.yaml, so the model's structure is not known"),
    ):
        _ = opened.recipe


def test_damaged_index_and_recipe(folder: Path, write_json: Callable[..., Path]) -> None:
    index = folder / "model.safetensors.index.json"
    metadata = json.loads(index.read_text())["metadata"]
    write_json(index, metadata=metadata | {"version": 2})
    with pytest.raises(CheckpointError, match="layout version 2, this sphinxkit reads 1; update it"):
        checkpoint.open(folder)
    write_json(index, metadata=metadata | {"files": {"a": {}}})
    with pytest.raises(CheckpointError, match="no usable list of files: KeyError"):
        checkpoint.open(folder)
    write_json(index, metadata=metadata | {"files": {"../a": {"size": 1}}})
    with pytest.raises(CheckpointError, match=r"names files outside its folder:\n  - ../a"):
        checkpoint.open(folder)
    write_json(index, metadata=metadata)
    (folder / "recipe.yaml").write_text("a: 1")
    with pytest.raises(CheckpointError, match=r"recipe.yaml has 4 bytes, the index says \d+\n.*recipe="):
        checkpoint.open(folder)
    del metadata["files"]["recipe.yaml"]  # as in directories of earlier versions
    write_json(index, metadata=metadata)
    for text, message in [("a: [", "cannot be read as YAML"), ("- a", "holds list, expected a recipe")]:
        (folder / "recipe.yaml").write_text(text)
        with pytest.raises(CheckpointError, match=rf"recipe.yaml: {message}"):
            checkpoint.open(folder)
    (folder / "recipe.yaml").write_text("!!python/object/apply:os.getcwd []")
    with pytest.raises(CheckpointError, match=r"recipe.yaml: cannot be read as YAML"):
        checkpoint.open(folder)
    index.write_text("{")
    with pytest.raises(CheckpointError, match=r"index.json: cannot be read as JSON"):
        checkpoint.open(folder)
