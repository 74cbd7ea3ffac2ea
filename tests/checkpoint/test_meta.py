from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sphinxkit import checkpoint
from sphinxkit.checkpoint import MappingSource
from sphinxkit.errors import CheckpointError

Model = tuple[MappingSource, dict[str, Any]]


@pytest.fixture
def folder(tmp_path: Path, text_model: Model) -> Path:
    source, recipe = text_model
    return checkpoint.save(tmp_path / "meta", source, format="meta", num_shards=2, recipe=recipe)


def test_files_are_those_of_meta(folder: Path, text_model: Model) -> None:
    source, _ = text_model
    assert sorted(path.name for path in folder.iterdir()) == [
        "consolidated.00.pth",
        "consolidated.01.pth",
        "params.json",
    ]
    first = torch.load(folder / "consolidated.00.pth", weights_only=True)
    embedding = source.read("llm.embed_tokens.weight")
    assert torch.equal(first["tok_embeddings.weight"], embedding[:, :16])
    assert torch.equal(first["layers.1.attention.wk.weight"], source.read("llm.layers.1.attention.k_proj.weight")[:8])
    assert torch.equal(
        first["layers.0.feed_forward.w2.weight"], source.read("llm.layers.0.mlp.down_proj.weight")[:, :20]
    )
    assert torch.equal(first["norm.weight"], source.read("llm.norm.weight"))


def test_reads_what_it_wrote(folder: Path, text_model: Model, same: Callable[..., None]) -> None:
    source, recipe = text_model
    with checkpoint.open(folder) as opened:
        assert opened.format == "meta"
        same(opened, source)
        assert opened.recipe == recipe


def test_embedding_split_along_the_vocabulary_is_seen_in_the_shape(folder: Path, text_model: Model) -> None:
    source, _ = text_model
    embedding = source.read("llm.embed_tokens.weight")
    for rank in (0, 1):
        path = folder / f"consolidated.0{rank}.pth"
        content = torch.load(path, weights_only=True)
        content["tok_embeddings.weight"] = embedding[12 * rank : 12 * (rank + 1)].clone()
        content["rope.freqs"] = torch.ones(4)
        torch.save(content, path)
    with checkpoint.open(folder) as opened:
        assert torch.equal(opened.read("llm.embed_tokens.weight"), embedding)
        assert len(opened) == len(list(source.keys()))


def test_missing_and_wrong_files(folder: Path, write_json: Callable[..., Path]) -> None:
    (folder / "consolidated.02.pth").write_bytes(b"")
    (folder / "consolidated.00.pth").rename(folder / "away")
    with pytest.raises(CheckpointError, match=r"shards are missing; fetch them:\n  - consolidated.00.pth"):
        checkpoint.open(folder)
    (folder / "away").rename(folder / "consolidated.00.pth")
    (folder / "consolidated.02.pth").unlink()
    write_json(folder / "params.json", use_scaled_rope=True)
    with pytest.raises(CheckpointError, match=r"params.json: use_scaled_rope .* not supported yet"):
        checkpoint.open(folder)
    write_json(folder / "params.json", use_scaled_rope=False, dim="wide")
    with pytest.raises(CheckpointError, match=r"params.json: 'dim' is 'wide', expected a positive whole number"):
        checkpoint.open(folder)
    write_json(folder / "params.json", use_scaled_rope=..., dim=32, moe={})
    with pytest.raises(CheckpointError, match=r"params.json: 'moe': a mixture-of-experts model, .* not supported yet"):
        checkpoint.open(folder)
    (folder / "params.json").unlink()
    with (
        checkpoint.open(folder) as opened,
        pytest.raises(CheckpointError, match=r"there is no params.json"),
    ):
        _ = opened.recipe


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no consolidated.NN.pth in it"):
        checkpoint.open(tmp_path, format="meta")


@pytest.mark.parametrize("with_params", [True, False])
def test_a_last_shard_that_is_missing_is_named(folder: Path, with_params: bool) -> None:
    if not with_params:
        (folder / "params.json").unlink()
    (folder / "consolidated.01.pth").unlink()
    with pytest.raises(CheckpointError, match=r"holds 1 of 2 shards; missing consolidated.01.pth; fetch them"):
        checkpoint.open(folder)
