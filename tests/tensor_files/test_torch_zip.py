from __future__ import annotations

import io
import os
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from sphinxkit.errors import CheckpointError
from sphinxkit.tensor_files.checksums import compare
from sphinxkit.tensor_files.torch_zip import read_torch_file, zip_checks


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_reads_tensors_in_either_layout(tmp_path: Path, is_zip: bool, wrapper: str | None) -> None:
    tensors = {"a": torch.arange(6).reshape(2, 3), "b": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16)}
    path = tmp_path / "x.pth"
    content = tensors if wrapper is None else {wrapper: OrderedDict(tensors), "epoch": 3}
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    found = read_torch_file(path)
    assert {name: (stored.shape, stored.dtype) for name, stored in found.items()} == {
        "a": ((2, 3), torch.int64),
        "b": ((2,), torch.bfloat16),
    }
    assert found["a"].view().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (str(path) in Path("/proc/self/maps").read_text()) == is_zip


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["top", "inside"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, is_zip: bool, place: str) -> None:
    marker, path = tmp_path / "executed", tmp_path / "x.pth"
    evil = Evil(marker)
    torch.save(evil if place == "top" else {"model": {"a": evil}}, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(CheckpointError, match=r"x.pth: refused: its pickle asks for \w+.system") as caught:
        read_torch_file(path)
    assert not marker.exists()
    assert "nothing of it was executed" in str(caught.value)
    assert "weights_only=False" not in str(caught.value)


def test_a_plain_pickle_and_a_tar_with_code_are_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    plain, tar = tmp_path / "plain.pth", tmp_path / "tar.pth"
    plain.write_bytes(pickle.dumps(Evil(marker)))
    with tarfile.open(tar, "w") as archive:
        info = tarfile.TarInfo("pickle")
        info.size = plain.stat().st_size
        archive.addfile(info, io.BytesIO(plain.read_bytes()))
    for path in (plain, tar):
        with pytest.raises(CheckpointError, match=path.name):
            read_torch_file(path)
    assert not marker.exists()


def test_truncated_and_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"a": torch.arange(1000)}, path)
    whole = path.read_bytes()
    for length in (10, 100, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=rf"x.pth: not a readable torch file \({length} bytes.*fetch it"):
            read_torch_file(path)
    for content in (b"hello, I am a text\n" * 20, b"\x00" * 64, b"PK\x03\x04" + b"\x00" * 64, b"\x89PNG\r\n" * 9):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"x.pth: (not a readable torch file|refused)"):
            read_torch_file(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="the file is empty"):
        read_torch_file(path)
    with pytest.raises(CheckpointError, match=r"none.pth: cannot be read"):
        read_torch_file(tmp_path / "none.pth")


def test_a_compressed_file_is_refused_before_it_unfolds(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"N0" * 2**20 + b"}.")
        archive.writestr("archive/version", b"3")
    assert path.stat().st_size < 10_000
    with pytest.raises(CheckpointError, match=r"a\.pth: not a readable torch file .*data\.pkl is compressed"):
        read_torch_file(path)


def test_changed_data_is_found_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"a": torch.full((64,), 7, dtype=torch.uint8)}, path)
    raw = path.read_bytes()
    position = raw.index(b"\x07" * 64)
    path.write_bytes(raw[:position] + b"\x08" + raw[position + 1 :])
    assert read_torch_file(path)["a"].view()[0] == 8  # the format itself does not notice
    assert compare(zip_checks(path)) == [f"{path}: record x/data/0 does not match its checksum"]
    path.write_bytes(raw)
    assert read_torch_file(path)["a"].view()[0] == 7
    assert compare(zip_checks(path)) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "holds a list, expected a dictionary"),
        (torch.zeros(1), "holds a Tensor, expected a dictionary"),
        ({"a": torch.zeros(1), "step": 3}, "entry 'step' is a int, expected a dense tensor"),
        ({"model": {"a": torch.zeros(1), 5: torch.zeros(1)}}, "entry 5 is a Tensor"),
        pytest.param(
            {"a": torch.zeros(2, 2).to_sparse()},
            "entry 'a' is a Tensor, expected a dense tensor",
            marks=pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants"),
        ),
        ({"model": {}}, "holds no tensors"),
    ],
)
def test_something_else_than_tensors(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "x.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        read_torch_file(path)


def test_a_zip_without_a_pickle(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "nothing here")
    with pytest.raises(CheckpointError, match="not a readable torch file"):
        read_torch_file(path)
