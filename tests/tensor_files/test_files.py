from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sphinxkit import tensor_files
from sphinxkit.errors import CheckpointError


def test_one_file_of_either_kind(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b.c": torch.tensor([1, 2])}
    save_file(tensors, tmp_path / "x.safetensors")
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "x.pth")
    for name in ("x.safetensors", "x.pth"):
        with tensor_files.open(tmp_path / name) as opened:
            assert opened.files == (tmp_path / name,)
            assert sorted(opened.keys()) == ["a", "b.c"]
            assert (opened.shape("a"), opened.dtype("b.c")) == ((2, 3), torch.int64)
            assert torch.equal(opened.read("a"), tensors["a"])
        with pytest.raises(CheckpointError, match=rf"{name} is closed"):
            opened.read("a")


def test_an_index_and_its_files(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "1.safetensors")
    save_file({"b": torch.zeros(2), "extra": torch.zeros(1)}, tmp_path / "2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    with pytest.raises(CheckpointError, match="'extra' is in 2.safetensors but not in model.safetensors.index.json"):
        tensor_files.open(index)
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors", "no": "1.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"'no' should be in 1.safetensors but is not"):
        tensor_files.open(index)
    tensors, files = tensor_files.read_tensor_files(index, is_optional=lambda name: name in ("extra", "no"))
    assert list(tensors) == ["a", "b", "extra"]
    assert [path.name for path in files] == ["1.safetensors", "2.safetensors"]


def test_what_is_no_file_of_tensors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a folder; give a file of tensors or its \*.index.json"):
        tensor_files.open(tmp_path)
    for name in ("none.safetensors", "none.bin"):
        with pytest.raises(CheckpointError, match=rf"{name}: cannot be read"):
            tensor_files.open(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"weight_map": ' + b"[" * 100_000, "cannot be read as JSON"),
        (b'{"weight_map": ', "cannot be read as JSON"),
        (b"\xff", "cannot be read as JSON"),
        (b"[]", "holds list, expected an object"),
    ],
)
def test_an_index_that_is_no_json_object(tmp_path: Path, content: bytes, message: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"model.safetensors.index.json: {message}"):
        tensor_files.open(index)
