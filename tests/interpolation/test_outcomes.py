from __future__ import annotations

import math

import pytest
import torch

from sphinxkit.errors import CheckpointError
from sphinxkit.interpolation import MixedSource, create
from sphinxkit.tensor_source import MappingSource
from tests.interpolation.stream_cases import EMBED, Make, mix


def spoiled(source: MappingSource, **values: float) -> MappingSource:
    tensors = {key: source.read(key).clone() for key in source.keys()}  # noqa: SIM118
    for key, value in values.items():
        tensors[key.replace("__", ".")].view(-1)[1] = value
    return MappingSource(tensors)


def test_nonfinite_numbers_are_all_named(make_model: Make) -> None:
    a = spoiled(make_model(0), llm__embed_tokens__weight=math.nan)
    b = spoiled(make_model(1), vision__start_token=math.inf)
    message = r"(?s)llm.embed_tokens.weight in first: 1 NaN, 0 Inf.*vision.start_token in second: 0 NaN, 1 Inf"
    with pytest.raises(CheckpointError, match=message):
        mix(a, b).read(EMBED)
    with pytest.raises(CheckpointError, match=message):
        list(mix(a, b, rules={"llm.*": "keep first"}).chunks(EMBED))
    allowed = mix(a, b, allow_nonfinite=True)
    assert allowed.read(EMBED).isnan().sum() == 1
    assert mix(a, b, rules={"llm.*": "keep first"}, allow_nonfinite=True).read(EMBED).isnan().sum() == 1


def test_a_result_that_overflows_is_named(make_model: Make) -> None:
    a = spoiled(make_model(0), llm__embed_tokens__weight=70000.0)
    with pytest.raises(CheckpointError, match=r"finite in every model, but the result does not fit torch.float16"):
        mix(a, a, dtype=torch.float16).read(EMBED)


def test_nonfinite_base_is_named(make_model: Make) -> None:
    base = spoiled(make_model(2), vision__start_token=math.nan)
    source = MixedSource([make_model(0), make_model(1)], create("task_arithmetic"), (0.5, 0.5), base=base)
    with pytest.raises(CheckpointError, match="vision.start_token in base: 1 NaN"):
        source.read("vision.start_token")


@pytest.mark.parametrize("method", ["dare", "ties", "task_arithmetic"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_a_method_would_drop_are_named_too(make_model: Make, method: str, value: float) -> None:
    b = spoiled(make_model(1), vision__start_token=value)
    for seed in range(8 if method == "dare" else 1):  # dare keeps one element in a hundred, another with every seed
        options = {"dare": {"drop_rate": 0.99, "seed": seed}}.get(method, {})
        source = MixedSource([make_model(0), b], create(method, **options), (0.5, 0.5), base=make_model(2))
        with pytest.raises(
            CheckpointError, match="vision.start_token in second: 1 NaN|vision.start_token in second: 0"
        ):
            source.read("vision.start_token")
