from __future__ import annotations

import inspect

import pytest
import torch

import sphinxkit.llama
from sphinxkit.errors import RegistryError, ShapeError
from sphinxkit.llama import LlamaModel, ffn_hidden_dim


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "expected"),
    [
        (4096, 256, None, 11008),  # LLaMA 2 7B
        (5120, 256, None, 13824),  # LLaMA 2 13B
        (8192, 4096, 1.3, 28672),  # LLaMA 2 70B
        (2048, 256, None, 5632),  # TinyLlama
        (64, 32, None, 192),
        (48, 1, None, 128),
        (96, 256, None, 256),
        (100, 1, 1.5, 399),  # int(266.67) = 266, times 1.5: cut twice
    ],
)
def test_ffn_hidden_dim_follows_metas_rule(dim: int, multiple_of: int, multiplier: float | None, expected: int) -> None:
    assert ffn_hidden_dim(dim, multiple_of, multiplier) == expected


def test_ffn_hidden_dim_refuses_sizes_that_are_not_positive() -> None:
    with pytest.raises(ShapeError, match="dim and multiple_of must be at least 1, got 0 and 256"):
        ffn_hidden_dim(0)
    with pytest.raises(ShapeError, match="dim and multiple_of must be at least 1, got 64 and 0"):
        ffn_hidden_dim(64, 0)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama2_7b", 6_738_415_616),  # the releases' parameter counts
        ("llama2_13b", 13_015_864_320),
        ("tinyllama_1b", 1_100_048_384),
        ("llama3_8b", 8_030_261_248),
        ("llama3_1_8b", 8_030_261_248),
        ("llama3_2_1b", 1_235_814_400),
        ("llama3_2_3b", 3_212_749_824),
        ("mistral_7b", 7_241_732_096),
        ("yi_6b", 6_061_035_520),
        ("qwen2_5_0_5b", 494_032_768),
        ("qwen2_5_1_5b", 1_543_714_304),
        ("qwen2_5_3b", 3_085_938_688),
        ("qwen2_5_7b", 7_615_616_512),
        ("qwen3_0_6b", 596_049_920),
        ("qwen3_1_7b", 1_720_574_976),
        ("qwen3_4b", 4_022_468_096),
        ("qwen3_8b", 8_190_735_360),
        ("smollm2_135m", 134_515_008),
        ("smollm2_360m", 361_821_120),
        ("smollm2_1_7b", 1_711_376_384),
    ],
)
def test_sizes_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = sphinxkit.llama.create(name)
    assert isinstance(model, LlamaModel)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model.max_seq_len == inspect.signature(sphinxkit.llama.registry.get(name)).parameters["max_seq_len"].default


@pytest.mark.parametrize("name", ["llama2_7b", "llama2_13b", "tinyllama_1b", "qwen3_4b"])
def test_every_number_of_a_size_can_be_overridden(name: str) -> None:
    builder = sphinxkit.llama.registry.get(name)
    free = inspect.signature(LlamaModel).parameters
    assert set(inspect.signature(builder).parameters) == set(free)
    changes = {
        "vocab_size": 11,
        "embed_dim": 24,
        "num_layers": 1,
        "num_heads": 6,
        "num_kv_heads": 3,
        "hidden_dim": 10,
        "max_seq_len": 7,
        "norm_eps": 1e-3,
        "rope_theta": 77.0,
        "rope_scaling": 0.5,
        "head_dim": 6,
        "qkv_bias": True,
        "qk_norm": True,
        "sliding_window": 5,
        "tie_embeddings": True,
        "attention": "eager",
        "moe": None,
    }
    assert set(changes) == set(free)
    model = builder(**changes)
    assert {name: getattr(model, name) for name in changes} == changes


def test_free_numbers_follow_the_rule_for_the_hidden_width_unless_it_is_given() -> None:
    sizes = {"embed_dim": 48, "num_layers": 1, "num_heads": 2, "vocab_size": 5}
    assert sphinxkit.llama.create("llama", **sizes).hidden_dim == 256
    assert sphinxkit.llama.create("llama", **sizes, multiple_of=8, ffn_dim_multiplier=1.1).hidden_dim == 144
    assert sphinxkit.llama.create("llama", **sizes, hidden_dim=50).hidden_dim == 50


def test_unknown_names_and_options_get_a_suggestion() -> None:
    with pytest.raises(RegistryError, match="unknown language model 'llama2_7B'; did you mean 'llama2_7b'"):
        sphinxkit.llama.create("llama2_7B")
    with pytest.raises(RegistryError, match="did you mean 'num_heads'"):
        sphinxkit.llama.create("tinyllama_1b", num_head=3)


def test_the_recipe_schema_is_made_of_the_builders_arguments() -> None:
    options = sphinxkit.llama.registry.options_model("tinyllama_1b")
    assert options().model_dump()["num_kv_heads"] == 4
    with pytest.raises(ValueError, match="embed_dims"):
        options(embed_dims=3)


def test_a_hundred_thousand_layers_are_refused_before_one_is_made() -> None:
    with torch.device("meta"), pytest.raises(ShapeError, match="num_layers may be 256 at most, got 100000"):
        LlamaModel(vocab_size=32, embed_dim=8, num_layers=100_000, num_heads=2, hidden_dim=16)
