from __future__ import annotations

import torch
from torch import nn

from sphinxkit.batch_inference.fingerprint import fingerprint


class Model(nn.Linear):
    """As much of a model as is read: weights, dtype, recipe and tokenizer."""

    recipe_yaml = "kind: model\n"
    tokenizer = None

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype


def make() -> Model:
    torch.manual_seed(0)
    return Model(40, 30)  # 1,200 values: more than are sampled


def test_equal_models_are_equal() -> None:
    assert fingerprint(make()) == fingerprint(make())  # type: ignore[arg-type]


def test_what_differs_is_named() -> None:
    first, other = make(), make()
    with torch.no_grad():
        other.weight.mul_(1.001)  # as training does: every value
    other.recipe_yaml = "kind: model\nllm: x\n"
    found = [fingerprint(model) for model in (first, other, make().bfloat16())]  # type: ignore[arg-type]
    assert [key for key in found[0] if found[0][key] != found[1][key]] == ["weights", "recipe"]
    assert found[2]["dtype"] == "bfloat16"
    assert found[2]["weights"] != found[0]["weights"]
