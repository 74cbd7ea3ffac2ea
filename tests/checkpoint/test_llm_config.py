from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

from sphinxkit import llama
from sphinxkit.checkpoint import MappingSource
from sphinxkit.checkpoint.formats import get_format
from sphinxkit.checkpoint.llm_config import (
    HEAD,
    LLM_DEFAULTS,
    NAMED_NUM_HEADS,
    differing,
    full_numbers,
    llm_errors,
    refuse_incomplete,
    refuse_options,
)
from sphinxkit.checkpoint.writing import TensorInput
from sphinxkit.errors import CheckpointError

FILE = Path("config.json")


def test_heads_of_named_sizes_are_those_of_the_builders() -> None:
    for name, heads in NAMED_NUM_HEADS.items():
        assert inspect.signature(llama.registry.get(name)).parameters["num_heads"].default == heads


def test_defaults_are_those_of_the_builders() -> None:
    parameters = inspect.signature(llama.registry.get("llama")).parameters
    assert {key: parameters[key].default for key in LLM_DEFAULTS} == LLM_DEFAULTS
    assert differing(LLM_DEFAULTS) == {}
    assert differing({"rope_theta": 500, "rope_scaling": 1, "norm_eps": 1e-6, "max_seq_len": 8}) == {
        "max_seq_len": 8,
        "norm_eps": 1e-6,
        "rope_theta": 500.0,
        "rope_scaling": 1.0,
    }
    assert differing({"rope_scaling": {"type": "yarn"}, "qk_norm": True}) == {
        "rope_scaling": {"type": "yarn"},
        "qk_norm": True,
    }


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
    llm = recipe["llm"]
    assert llm_errors(llm, source, FILE) == []
    wrong = llm_errors(llm | {"hidden_dim": 48}, source, FILE)
    assert wrong[0] == "llm.layers.0.mlp.gate_proj.weight is [40, 32], the configuration asks for [48, 32]"
    assert len(wrong) == 6  # three projections in two layers
    assert llm_errors(llm | {"num_layers": 1}, source, FILE) == [
        "tensors of layers [1] exist, the configuration has 1 layers"
    ]
    assert llm_errors(llm | {"num_layers": 10**12}, source, FILE) == []  # the work is that of the layers that exist
    with pytest.raises(CheckpointError, match="3 heads and 2 key-value heads do not divide a width of 32"):
        llm_errors(llm | {"num_heads": 3}, source, FILE)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("layers.1.", "llm.layers.1.mlp.up_proj.weight"),
        ("lm_head", "llm.lm_head.weight"),
        ("llm.norm", "llm.norm.weight"),
    ],
)
def test_an_incomplete_model_is_not_described_as_a_smaller_one(
    text_model: tuple[MappingSource, dict[str, dict[str, object]]], name: str, missing: str
) -> None:
    """Written with the numbers of what is left, it would load and answer."""
    source, recipe = text_model
    llm = recipe["llm"]
    refuse_incomplete(llm, full_numbers(llm, source), source)
    rest = MappingSource({key: source.read(key) for key in source.keys() if name not in key})  # noqa: SIM118
    with pytest.raises(CheckpointError, match=f"the language model is incomplete:(?s:.)*- no {missing}"):
        refuse_incomplete(llm, full_numbers(llm, rest), rest)
    for format in ("hf", "meta", "sphinx"):
        with pytest.raises(CheckpointError, match="incomplete|has no place for tie_embeddings"):
            get_format(format).numbers(TensorInput(rest, None, None, None), recipe)


def test_a_named_size_may_tie_its_head(text_model: tuple[MappingSource, dict[str, dict[str, object]]]) -> None:
    source, _ = text_model
    tied = MappingSource({key: source.read(key) for key in source.keys() if key != HEAD})  # noqa: SIM118
    llm = {"type": "qwen3_0_6b", "num_heads": 4}
    refuse_incomplete(llm, full_numbers(llm, tied), tied)


def test_formats_of_llama_2s_time_refuse_what_they_have_no_place_for() -> None:
    numbers = {**LLM_DEFAULTS, "qk_norm": True, "head_dim": 8, "rope_scaling": {"type": "yarn"}}
    with pytest.raises(CheckpointError, match="'meta' has no place for head_dim 8, qk_norm True, rope_scaling of type"):
        refuse_options(numbers, "meta")
    refuse_options({**LLM_DEFAULTS, "rope_scaling": 0.5}, "meta")
