from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sphinxkit import checkpoint, llama
from sphinxkit.checkpoint import MappingSource
from sphinxkit.checkpoint.formats.meta import ffn_hidden_dim, ffn_rule, llm_from_meta, meta_from_numbers
from sphinxkit.checkpoint.llm_config import LLM_DEFAULTS, full_numbers
from sphinxkit.errors import CheckpointError

Model = tuple[MappingSource, dict[str, Any]]
FILE = Path("config.json")


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
    with pytest.raises(CheckpointError, match=r"params.json: 'moe': a mixture of experts, but the files hold none"):
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


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "expected"),
    # 7B, 13B and 70B of Llama 2, then by hand: int(8*64/3)=170 -> 192; int(1.3*170)=221 -> 224
    [
        (4096, 256, None, 11008),
        (5120, 256, None, 13824),
        (8192, 4096, 1.3, 28672),
        (64, 32, None, 192),
        (64, 32, 1.3, 224),
    ],
)
def test_feed_forward_width(dim: int, multiple_of: int, multiplier: float | None, expected: int) -> None:
    assert ffn_hidden_dim(dim, multiple_of, multiplier) == expected


@given(dim=st.integers(1, 9000), multiple_of=st.integers(1, 4096), multiplier=st.none() | st.floats(0.1, 4))
def test_feed_forward_width_agrees_with_the_model(dim: int, multiple_of: int, multiplier: float | None) -> None:
    assert ffn_hidden_dim(dim, multiple_of, multiplier) == llama.ffn_hidden_dim(dim, multiple_of, multiplier)


@given(dim=st.integers(1, 9000), hidden=st.integers(1, 40000))
def test_feed_forward_rule_gives_the_width_back(dim: int, hidden: int) -> None:
    assert ffn_hidden_dim(dim, *ffn_rule(dim, hidden)) == hidden


def test_usual_widths_keep_the_usual_rule() -> None:
    assert ffn_rule(4096, 11008) == (256, None)
    assert ffn_rule(5120, 13824) == (256, None)


def test_configuration_by_hand() -> None:
    config = {"dim": 64, "n_layers": 3, "n_heads": 4, "multiple_of": 32, "norm_eps": 1e-05, "vocab_size": -1}
    assert llm_from_meta(config, FILE, 512) == {
        "type": "llama",
        "vocab_size": 512,
        "embed_dim": 64,
        "num_layers": 3,
        "num_heads": 4,
        "hidden_dim": 192,
        "attention": "auto",
    }
    config |= {"n_kv_heads": 2, "norm_eps": 1e-6, "rope_theta": 1000000, "rope_scaling": 0.5, "ffn_dim_multiplier": 1.3}
    assert llm_from_meta(config, FILE, 512) == {
        "type": "llama",
        "vocab_size": 512,
        "embed_dim": 64,
        "num_layers": 3,
        "num_heads": 4,
        "hidden_dim": 224,
        "num_kv_heads": 2,
        "norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": 0.5,
        "attention": "auto",
    }


def test_missing_keys_have_the_public_defaults() -> None:
    llm = llm_from_meta({}, FILE, 32000)
    assert (llm["embed_dim"], llm["num_layers"], llm["num_heads"], llm["hidden_dim"]) == (4096, 32, 32, 11008)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"n_layer": 3}, r"(?s)config.json: unknown keys:.*'n_layer'; did you mean 'n_layers'"),
        ({"dim": "64"}, "'dim' is '64', expected a positive whole number"),
        ({"dim": 64.5}, r"'dim' is 64.5, expected a positive whole number"),
        ({"n_heads": True}, "'n_heads' is True"),
        ({"n_layers": 0}, "'n_layers' is 0"),
        ({"dim": None}, "'dim' is None"),
        ({"dim": float("inf")}, "'dim' is inf, expected a positive whole number"),
        ({"norm_eps": float("nan")}, "'norm_eps' is nan, expected a positive number"),
        ({"n_layers": 10**400}, "expected a positive whole number"),
        ({"ffn_dim_multiplier": 1e308}, "'ffn_dim_multiplier' is 1e"),
        ({"rope_theta": -1}, "'rope_theta' is -1, expected a positive number"),
    ],
)
def test_configuration_that_is_none(config: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        llm_from_meta(config, FILE, 10)


def test_numbers_from_tensors_and_back(text_model: tuple[MappingSource, dict[str, dict[str, object]]]) -> None:
    source, recipe = text_model
    llm = recipe["llm"]
    numbers = full_numbers(llm, source)
    written = {key: value for key, value in llm.items() if key not in ("type", "attention")}
    assert numbers == {**LLM_DEFAULTS, **written}
    assert llm_from_meta(meta_from_numbers(numbers), FILE, 24) == llm
    with pytest.raises(CheckpointError, match="does not say num_heads"):
        full_numbers({"type": "my.module:build"}, source)
    with pytest.raises(
        CheckpointError, match=r"(?s)language model is incomplete:.*no embedding \(llm.embed_tokens.weight\)"
    ):
        full_numbers(llm, MappingSource({}))
