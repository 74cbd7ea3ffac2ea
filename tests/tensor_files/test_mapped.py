from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sphinxkit.errors import CheckpointError
from sphinxkit.tensor_files.mapped import MappedFile
from sphinxkit.tensor_files.safetensors import read_safetensors, write_safetensors
from sphinxkit.tensor_files.spec import TensorSpec
from sphinxkit.tensor_files.torch_zip import read_torch_file

SHAPE = (64, 1024)  # 256 KiB: many pages, so that a cut file has pages that are gone


def _safetensors(path: Path, tensor: Tensor) -> Callable[[], Tensor]:
    write_safetensors(path, [TensorSpec("w", SHAPE, tensor.dtype)], lambda name: tensor)
    return read_safetensors(path)[0]["w"].read


def _torch(path: Path, tensor: Tensor) -> Callable[[], Tensor]:
    torch.save({"w": tensor}, path)
    return read_torch_file(path)["w"].read


@pytest.mark.parametrize("make", [_safetensors, _torch])
@pytest.mark.parametrize("was_read", [False, True])
def test_a_file_cut_short_after_it_was_opened_is_an_error(
    tmp_path: Path, make: Callable[[Path, Tensor], Callable[[], Tensor]], was_read: bool
) -> None:
    path, tensor = tmp_path / "x.bin", torch.arange(64 * 1024, dtype=torch.float32).reshape(SHAPE)
    read = make(path, tensor)
    if was_read:
        torch.testing.assert_close(read(), tensor, rtol=0, atol=0)
    os.truncate(path, 5000)  # a smaller one by which a page is gone
    with pytest.raises(CheckpointError, match=r"x\.bin: was cut short while it was in use: 5000 of \d+ bytes are left"):
        read()


@pytest.mark.parametrize("make", [_safetensors, _torch])
def test_a_file_that_is_replaced_keeps_its_content(
    tmp_path: Path, make: Callable[[Path, Tensor], Callable[[], Tensor]]
) -> None:
    tensor = torch.randn(SHAPE)
    read = make(tmp_path / "x.bin", tensor)
    make(tmp_path / "other.bin", tensor + 1)
    (tmp_path / "other.bin").replace(tmp_path / "x.bin")
    torch.testing.assert_close(read(), tensor, rtol=0, atol=0)


def test_a_file_that_went_away(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.bin: cannot be read: .*No such file"):
        MappedFile(tmp_path / "gone.bin", 8)
