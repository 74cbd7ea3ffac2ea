from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sphinxkit import llama
from sphinxkit.checkpoint import MappingSource
from sphinxkit.checkpoint.llm_config import (
    NAMED_NUM_HEADS,
    check_llm_shapes,
    ffn_hidden_dim,
    ffn_rule,
    full_numbers,
    llm_from_meta,
    meta_from_numbers,
)
from sphinxkit.errors import CheckpointError

FILE = Path("config.json")


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


def test_heads_of_named_sizes_are_those_of_the_builders() -> None:
    import inspect

    for name, heads in NAMED_NUM_HEADS.items():
        assert inspect.signature(llama.registry.get(name)).parameters["num_heads"].default == heads


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
    assert numbers == {key: value for key, value in llm.items() if key not in ("type", "attention")}
    assert llm_from_meta(meta_from_numbers(numbers), FILE, 24) == llm
    with pytest.raises(CheckpointError, match="does not say num_heads"):
        full_numbers({"type": "my.module:build"}, source)
    with pytest.raises(
        CheckpointError, match=r"(?s)language model is incomplete:.*no embedding \(llm.embed_tokens.weight\)"
    ):
        full_numbers(llm, MappingSource({}))


def test_a_named_size_is_enough() -> None:
    shapes = {
        "llm.embed_tokens.weight": (32000, 2048),
        "llm.layers.0.attention.k_proj.weight": (256, 2048),
        "llm.layers.0.mlp.gate_proj.weight": (5632, 2048),
    }
    source = MappingSource({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    numbers = full_numbers({"type": "tinyllama_1b", "attention": "auto"}, source)
    assert (numbers["num_heads"], numbers["num_kv_heads"], numbers["hidden_dim"]) == (32, 4, 5632)


def test_tensors_that_contradict_the_configuration(
    text_model: tuple[MappingSource, dict[str, dict[str, object]]],
) -> None:
    source, recipe = text_model
    check_llm_shapes(recipe["llm"], source, FILE)
    with pytest.raises(CheckpointError, match=r"gate_proj.weight is \[40, 32\], the configuration asks for \[48, 32\]"):
        check_llm_shapes(recipe["llm"] | {"hidden_dim": 48}, source, FILE)
    with pytest.raises(CheckpointError, match=r"tensors of layers \[1\] exist, the configuration has 1 layers"):
        check_llm_shapes(recipe["llm"] | {"num_layers": 1}, source, FILE)
    with pytest.raises(CheckpointError, match="3 heads and 2 key-value heads do not divide a width of 32"):
        check_llm_shapes(recipe["llm"] | {"num_heads": 3}, source, FILE)
