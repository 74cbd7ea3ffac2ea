from __future__ import annotations

from pathlib import Path

import pytest

from sphinxkit.checkpoint.formats.hf_config import llm_from_hf
from sphinxkit.errors import CheckpointError

CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def test_defaults_of_the_configuration() -> None:
    config = CONFIG | {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}
    assert llm_from_hf(config, Path("config.json"), 7) == {
        "type": "llama",
        "vocab_size": 7,
        "embed_dim": 8,
        "num_layers": 1,
        "num_heads": 2,
        "hidden_dim": 16,
        "max_seq_len": 2048,
        "norm_eps": 1e-6,
        "rope_theta": 500.0,
        "attention": "auto",
    }


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_a_number_of_layers_costs_nothing(kind: str) -> None:
    changes = {"model_type": kind, "num_hidden_layers": 10**12, "num_key_value_heads": 2, "sliding_window": 16}
    llm = llm_from_hf(CONFIG | changes, Path("config.json"), 7)
    assert (llm["num_layers"], llm.get("sliding_window")) == (10**12, 16 if kind == "mistral" else None)


@pytest.mark.parametrize(
    "key",
    ["rope_theta", "rms_norm_eps", "max_position_embeddings", "rope_scaling", "num_key_value_heads", "sliding_window"],
)
def test_null_is_what_a_missing_key_is(key: str) -> None:
    file = Path("config.json")
    assert llm_from_hf(CONFIG | {key: None}, file, 7) == llm_from_hf(CONFIG, file, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": "10k"}, "'rope_theta' is '10k', expected a positive number"),
        ({"rms_norm_eps": float("nan")}, "'rms_norm_eps' is nan, expected a positive number"),
        ({"rms_norm_eps": True}, "'rms_norm_eps' is True, expected a positive number"),
        ({"hidden_size": None}, "'hidden_size' is None, expected a positive whole number"),
        ({"num_hidden_layers": 0}, "'num_hidden_layers' is 0, expected a positive whole number"),
        ({"num_key_value_heads": "2"}, "'num_key_value_heads' is '2', expected a positive whole number"),
        ({"max_position_embeddings": 2.5}, "'max_position_embeddings' is 2.5, expected a positive whole number"),
        ({"rope_scaling": "linear"}, "'rope_scaling' is 'linear', expected an object"),
        (
            {"rope_scaling": {"type": "linear", "factor": "2"}},
            "'rope_scaling.factor' is '2', expected a positive number",
        ),
        ({"rope_parameters": {"rope_theta": []}}, r"'rope_parameters.rope_theta' is \[\], expected a positive number"),
        ({"layer_types": 3}, "'layer_types' is 3, expected a name for each of 1 layers"),
    ],
)
def test_values_that_are_no_numbers(changes: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"config.json cannot be followed:\n  - {message}"):
        llm_from_hf(CONFIG | changes, Path("config.json"), 7)
