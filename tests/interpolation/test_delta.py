from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sphinxkit.errors import CheckpointError
from sphinxkit.interpolation.delta import delta_source, restored_source
from sphinxkit.tensor_source import MappingSource


def test_by_hand() -> None:
    base = MappingSource({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([5.0])})
    tuned = MappingSource({"a": torch.tensor([1.5, 0.0]), "b": torch.tensor([5.0]), "new": torch.tensor([7.0])})
    delta = delta_source(base, tuned)
    assert {key: delta.read(key).tolist() for key in delta.keys()} == {"a": [0.5, -2.0], "b": [0.0], "new": [7.0]}  # noqa: SIM118
    restored = restored_source(base, delta)
    for key in tuned.keys():  # noqa: SIM118
        assert torch.equal(restored.read(key), tuned.read(key))


def test_a_delta_of_some_tensors_leaves_the_others(make_model: Callable[..., MappingSource]) -> None:
    base = make_model(0)
    result = restored_source(base, MappingSource({"vision.start_token": torch.ones(1, 1, 4)}))
    assert torch.equal(result.read("vision.start_token"), base.read("vision.start_token") + 1)
    assert torch.equal(result.read("llm.embed_tokens.weight"), base.read("llm.embed_tokens.weight"))


def test_dtypes(make_model: Callable[..., MappingSource]) -> None:
    base, tuned = make_model(0, torch.bfloat16), make_model(1, torch.float16)
    key = "llm.embed_tokens.weight"
    assert delta_source(base, tuned).dtype(key) == torch.float16
    exact = delta_source(base, tuned, dtype=torch.float32)
    assert torch.equal(exact.read(key), tuned.read(key).float() - base.read(key).float())
    assert restored_source(base, exact).dtype(key) == torch.bfloat16
    assert torch.equal(restored_source(base, exact, dtype=torch.float16).read(key), tuned.read(key))


def test_what_a_delta_cannot_say(make_model: Callable[..., MappingSource]) -> None:
    base, tuned = make_model(0, vision__gone=(2,)), make_model(1)
    with pytest.raises(CheckpointError, match=r"(?s)cannot take away.*vision.gone"):
        delta_source(base, tuned)
    with pytest.raises(CheckpointError, match=r"\[6, 4\] in base, \[7, 4\] in delta"):
        restored_source(make_model(0), make_model(1, llm__embed_tokens__weight=(7, 4)))
