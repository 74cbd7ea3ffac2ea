from __future__ import annotations

import pytest
import torch

from sphinxkit.errors import CheckpointError
from sphinxkit.interpolation.sources import JoinedSource, SelectedSource
from sphinxkit.tensor_source import MappingSource
from tests.interpolation.stream_cases import UP, Make, mix


def test_joined_and_selected(make_model: Make) -> None:
    a, b = make_model(0), MappingSource({"extra": torch.ones(2)})
    both = JoinedSource([a, b])
    assert list(both.keys()) == [*a.keys(), "extra"]
    assert list(JoinedSource([a, b], lambda key: "layers.1" in key or key == "extra").keys()) == [UP, "extra"]
    assert (both.shape("extra"), both.dtype("extra")) == ((2,), torch.float32)
    with pytest.raises(CheckpointError, match="no source holds 'none'"):
        both.read("none")
    with pytest.raises(CheckpointError, match="both hold 'extra'"):
        JoinedSource([b, b])
    source = mix(both, both)  # type: ignore[arg-type]
    part = SelectedSource(source, lambda key: key == "extra")
    assert list(part.keys()) == ["extra"]
    assert torch.equal(part.read("extra"), torch.ones(2))
    assert torch.equal(torch.cat(list(part.chunks("extra"))), torch.ones(2))
    assert (part.shape("extra"), part.dtype("extra")) == ((2,), torch.float32)
    out = torch.zeros(2)
    part.read_into("extra", out)
    assert torch.equal(out, torch.ones(2))
