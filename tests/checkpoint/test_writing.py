"""Writing from a source that gives its tensors in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sphinxkit import checkpoint
from sphinxkit.errors import CheckpointError
from sphinxkit.tensor_files.safetensors import write_safetensors
from sphinxkit.tensor_files.spec import TensorSpec
from sphinxkit.tensor_source import ChunkedSource, MappingSource


class InPieces(MappingSource):
    def chunks(self, key: str) -> Iterator[Tensor]:
        yield from self.read(key).reshape(-1).split(5)


def test_pieces_make_the_same_files(tmp_path: Path) -> None:
    tensors = {f"llm.layers.{i}.mlp.up_proj.weight": torch.randn(3, 4 + i) for i in range(3)}
    assert isinstance(InPieces(tensors), ChunkedSource)
    assert not isinstance(MappingSource(tensors), ChunkedSource)
    seen: list[tuple[str, int]] = []
    checkpoint.save(tmp_path / "whole", MappingSource(tensors), dtype=torch.bfloat16)
    checkpoint.save(
        tmp_path / "pieces",
        InPieces(tensors),
        dtype=torch.bfloat16,
        progress=lambda key, size: seen.append((key, size)),
        unused=InPieces({"llma.clip.logit_scale": torch.ones(1)}),
    )
    whole, pieces = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "pieces"))
    assert whole == pieces
    assert seen == [(key, 2 * tensor.numel()) for key, tensor in tensors.items()] + [("llma.clip.logit_scale", 2)]


def test_pieces_must_be_what_was_announced(tmp_path: Path) -> None:
    spec = [TensorSpec("x", (2, 3), torch.float32)]

    def write(*pieces: Tensor) -> None:
        write_safetensors(tmp_path / "x.safetensors", spec, torch.empty, chunks=lambda _: iter(pieces))  # type: ignore[arg-type]

    write(torch.zeros(4), torch.zeros(2))
    with pytest.raises(CheckpointError, match=r"announced as torch.float32 but a piece is torch.float16"):
        write(torch.zeros(4), torch.zeros(2, dtype=torch.float16))
    with pytest.raises(CheckpointError, match=r"announced as \[2, 3\] but came in 5 elements"):
        write(torch.zeros(5))
