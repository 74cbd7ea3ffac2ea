from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sphinxkit.errors import CheckpointError
from sphinxkit.tensor_files.lazy import LazySource, StoredTensor
from sphinxkit.tensor_source import TensorSource


def stored(tensor: torch.Tensor) -> StoredTensor:
    return StoredTensor(Path("file"), "w", tuple(tensor.shape), tensor.dtype, lambda: tensor)


def test_source_answers_and_complains() -> None:
    source = LazySource({"weight": stored(torch.ones(2, 3))}, "the place")
    assert isinstance(source, TensorSource)
    assert "weight" in source
    assert len(source) == 1
    assert list(source.keys()) == ["weight"]
    assert source.num_bytes("weight") == 24
    with pytest.raises(CheckpointError, match="the place holds no tensor 'wieght'; did you mean 'weight'"):
        source.read("wieght")
    with pytest.raises(CheckpointError, match=r"'weight' is \[2, 3\], asked for \[3, 2\]"):
        source.read_into("weight", torch.empty(3, 2))
    source.close()
    with pytest.raises(CheckpointError, match="the place is closed"):
        source.shape("weight")


def test_reads_and_converts_without_a_copy_in_between() -> None:
    tensor = torch.tensor([1.5, 2.5])
    with LazySource({"w": stored(tensor)}, "the place") as source:
        assert source.read("w") is tensor
        assert source["w"] is tensor
        assert [*source] == ["w"]
        out = torch.empty(2, dtype=torch.float64)
        source.read_into("w", out)
        assert out.tolist() == [1.5, 2.5]
    with pytest.raises(CheckpointError, match="the place is closed; read before leaving the with block"):
        source.read("w")
