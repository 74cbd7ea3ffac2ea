from __future__ import annotations

import pytest
import torch
from torch import nn

from sphinxkit.errors import CheckpointError
from sphinxkit.tensor_source import MappingSource, ModuleSource, TensorSource, joined, prefixed


def test_mapping_is_a_source() -> None:
    tensor = torch.arange(6.0).reshape(2, 3).requires_grad_()
    source = MappingSource({"b": tensor, "a": torch.tensor(1)})
    assert isinstance(source, TensorSource)
    assert list(source.keys()) == ["b", "a"]
    assert source.shape("b") == (2, 3)
    assert source.dtype("a") == torch.int64
    assert source.read("b").data_ptr() == tensor.data_ptr()
    assert not source.read("b").requires_grad


def test_module_gives_parameters_and_saved_buffers() -> None:
    module = nn.BatchNorm1d(2)
    module.register_buffer("scratch", torch.zeros(1), persistent=False)
    assert list(ModuleSource(module).keys()) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def test_a_model_without_weights_cannot_be_read() -> None:
    source = ModuleSource(nn.Linear(2, 2, device="meta"))
    assert source.shape("weight") == (2, 2)
    with pytest.raises(CheckpointError, match="'weight' is on the meta device: the model has no weights yet"):
        source.read("weight")


def test_a_prefix_before_every_name() -> None:
    source = prefixed(MappingSource({"a.b": torch.ones(2), "c": torch.zeros(3, dtype=torch.int64)}), "part.")
    assert isinstance(source, TensorSource)
    assert list(source.keys()) == ["part.a.b", "part.c"]
    assert (source.shape("part.c"), source.dtype("part.c")) == ((3,), torch.int64)
    assert torch.equal(source.read("part.a.b"), torch.ones(2))


def test_joined() -> None:
    a, b = MappingSource({"x.a": torch.zeros(3), "y.a": torch.zeros(1)}), MappingSource({"extra": torch.ones(2)})
    both = joined([a, b])
    assert list(both.keys()) == ["x.a", "y.a", "extra"]
    assert list(joined([a, b], lambda key: key in ("extra", "y.a")).keys()) == ["y.a", "extra"]
    assert (both.shape("extra"), both.dtype("extra")) == ((2,), torch.float32)
    assert torch.equal(both.read("extra"), torch.ones(2))
    assert list(both.among({"extra", "none"}).keys()) == ["extra"]
    assert (list(both.below("x.").keys()), both.below("x.").shape("a")) == (["a"], (3,))
    for use in (both.read, both.shape, both.dtype):
        with pytest.raises(CheckpointError, match="no source holds 'none'"):
            use("none")
    with pytest.raises(CheckpointError, match="both hold 'extra'"):
        joined([b, b])
