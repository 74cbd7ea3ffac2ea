from __future__ import annotations

import pytest
import torch

from sphinxkit.errors import DataError
from sphinxkit.generation import Sampling, top_p_probs

# Probabilities of some tens of tokens in float32 against float64
PROBS_ATOL = 1e-6


def test_top_p_equals_the_public_implementation(golden) -> None:
    import json

    from safetensors.torch import load_file

    for folder in ("llama_ens5", "llama_ens_light"):
        tensors = load_file(golden / folder / "golden.safetensors")
        fact = json.loads((golden / folder / "golden.json").read_text())["top_p"]
        probs, ids = top_p_probs(tensors["top_p.logits"], fact["temperature"], fact["top_p"])
        torch.testing.assert_close(probs, tensors["top_p.sorted_filtered_probs"], atol=PROBS_ATOL, rtol=0)
        assert (probs > 0).sum(-1).tolist() == fact["n_kept"]
        assert ids[:, 0].tolist() == tensors["top_p.logits"].argmax(-1).tolist()


def test_top_p_on_a_hand_worked_example() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.25, 0.15]]).log()
    probs, ids = top_p_probs(logits, 1.0, 0.6)  # 0.5 before the second token: kept; 0.75 before the third: dropped
    assert ids[0].tolist() == [1, 2, 3, 0]
    torch.testing.assert_close(probs, torch.tensor([[2 / 3, 1 / 3, 0.0, 0.0]]), atol=PROBS_ATOL, rtol=0)


def test_a_mass_of_exactly_top_p_before_a_token_keeps_it() -> None:
    probs, _ = top_p_probs(torch.zeros(1, 2), 1.0, 0.5)
    assert probs.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.5}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"temperature": float("inf")}, "temperature must be 0 .* and finite; got inf"),
        ({"temperature": 10**400}, "temperature is beyond all floats"),
        ({"temperature": "0.5"}, "temperature must be a number, got '0.5'"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number, got 2.5"),
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number, got True"),
        ({"max_new_tokens": float("inf")}, "max_new_tokens must be a whole number, got inf"),
        ({"seed": "1"}, "seed must be a whole number, got '1'"),
        ({"stop": 5}, "stop must be a text or several, got 5"),
        ({"stop": ("a", 5)}, "stop must be a text or several"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"stop": ("a", "")}, "a stop string is empty"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Sampling(**options)


def test_numbers_of_neighbouring_types() -> None:
    import numpy as np

    found = Sampling(np.int64(2), temperature=1, top_p=np.float32(0.5), stop="x", seed=3.0)  # type: ignore[arg-type]
    assert found == Sampling(2, 1.0, 0.5, ("x",), 3)
    assert type(found.max_new_tokens) is type(found.seed) is int
    assert type(found.temperature) is type(found.top_p) is float
