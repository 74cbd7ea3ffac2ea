from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sphinxkit
from sphinxkit import checkpoint
from sphinxkit.errors import CheckpointError


def test_one_call_converts_and_tells_how_far_it_is(golden: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    written = sphinxkit.convert(
        golden / "llama_ens_light",
        tmp_path / "own",
        dtype=torch.bfloat16,
        progress=lambda key, num_bytes, total: told.append((key, num_bytes, total)),
    )
    assert written == tmp_path / "own"
    assert len({total for _, _, total in told}) == 1
    assert sum(num_bytes for _, num_bytes, _ in told) == told[0][2]
    with checkpoint.open(golden / "llama_ens_light") as before, checkpoint.open(written, verify=True) as after:
        assert after.format == "sphinxkit"
        assert [name for name, _, _ in told] == [*after, *after.unused]
        assert list(before.unused) == list(after.unused)
        key = "llm.layers.1.mlp.up_proj.weight"
        assert torch.equal(after.read(key), before.read(key).bfloat16())


@pytest.mark.parametrize("format", ["meta", "hf"])
def test_the_language_model_alone(golden: Path, tmp_path: Path, format: str) -> None:
    told: list[int] = []
    sphinxkit.convert(
        golden / "llama_ens_light",
        tmp_path / "llm",
        format=format,
        llm_only=True,
        progress=lambda key, num_bytes, total: told.append(total - num_bytes),
    )
    with checkpoint.open(golden / "llama_ens_light") as before, checkpoint.open(tmp_path / "llm") as after:
        llm = [key for key in before if key.startswith("llm.")]
        assert sorted(after) == sorted(llm)
        assert len(told) == len(llm)
        assert all(torch.equal(before.read(key), after.read(key)) for key in llm)


def test_what_cannot_be_converted(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="unknown checkpoint format 'gguf'; known: hf, meta, sphinx, sphinxkit"):
        sphinxkit.convert(tmp_path / "none", tmp_path / "out", format="gguf")
    with pytest.raises(CheckpointError, match="there is no such folder"):
        sphinxkit.convert(tmp_path / "none", tmp_path / "out")
    with pytest.raises(CheckpointError, match="format 'hf' holds a language model alone"):
        sphinxkit.convert(golden / "llama_ens_light", tmp_path / "out", format="hf")
    assert list(tmp_path.iterdir()) == []
