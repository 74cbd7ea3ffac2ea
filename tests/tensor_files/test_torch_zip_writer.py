from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from sphinxkit.errors import CheckpointError
from sphinxkit.tensor_files.checksums import compare
from sphinxkit.tensor_files.spec import TensorSpec
from sphinxkit.tensor_files.torch_zip import TorchFileWriter, read_torch_file, zip_checks

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
          torch.int8, torch.uint8, torch.bool)  # fmt: skip


def spec(name: str, tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(name, tuple(tensor.shape), tensor.dtype)


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("wrapper", [None, "model"])
def test_torch_reads_what_is_written(tmp_path: Path, mmap: bool, wrapper: str | None) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {str(dtype): (torch.rand(3, 2, 4, generator=generator) * 50).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(1.25), "empty": torch.zeros(0, 3)}
    tensors |= {"slice": torch.arange(12).reshape(3, 4)[:, 1:3]}
    path = tmp_path / "x.pth"
    with TorchFileWriter(path, [spec(name, tensor) for name, tensor in tensors.items()], wrapper) as writer:
        for tensor in tensors.values():
            writer.write(tensor)
    loaded = torch.load(path, weights_only=True, mmap=mmap)
    loaded = loaded if wrapper is None else loaded[wrapper]
    assert list(loaded) == list(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].is_contiguous()
        if mmap and tensor.numel():
            assert loaded[name].data_ptr() % 64 == 0  # as aligned as torch's own files
    assert zipfile.ZipFile(path).testzip() is None
    assert compare(zip_checks(path)) == []
    assert torch.equal(read_torch_file(path)["slice"].view(), tensors["slice"])


def test_records_are_those_of_torch(tmp_path: Path) -> None:
    tensor = torch.arange(4.0)
    torch.save({"a": tensor}, tmp_path / "theirs.pth")
    with TorchFileWriter(tmp_path / "ours.pth", [spec("a", tensor)]) as writer:
        writer.write(tensor)

    def records(name: str) -> dict[str, bytes]:
        with zipfile.ZipFile(tmp_path / name) as archive:
            return {info.filename.split("/", 1)[1]: archive.read(info) for info in archive.infolist()}

    theirs, ours = records("theirs.pth"), records("ours.pth")
    for name in ("data/0", "version", "byteorder"):
        assert ours[name] == theirs[name]


def test_only_what_was_announced_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    with pytest.raises(CheckpointError, match=r"'a' is torch.complex64, which cannot be written"):
        TorchFileWriter(path, [TensorSpec("a", (1,), torch.complex64)])
    announced = [TensorSpec("a", (2,), torch.float32)]
    with (
        pytest.raises(CheckpointError, match=r"'a' was announced as \[2\] torch.float32 but is \[3\] torch.float32"),
        TorchFileWriter(path, announced) as writer,
    ):
        writer.write(torch.zeros(3))
    with pytest.raises(CheckpointError, match="0 of 1 announced tensors"), TorchFileWriter(path, announced):
        pass
