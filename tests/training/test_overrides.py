from __future__ import annotations

import pytest

from sphinxkit.errors import RecipeError
from sphinxkit.recipe import Recipe
from sphinxkit.training import TrainPlan
from sphinxkit.training.overrides import override, read_plan

DOCUMENT = {"lr": 1.0, "data": {"a": {"weight": 1}}, "lora": None}


def test_settings_are_yaml() -> None:
    settings = ["lr=2e-5", "data.a.weight=3", "lora.rank=4", "train=[image_delimiters]", "init_from=a=b"]
    assert override(DOCUMENT, [*settings, "max_grad_norm=null", "output=inf"]) == {
        "lr": 2e-5,
        "data": {"a": {"weight": 3}},
        "lora": {"rank": 4},
        "train": ["image_delimiters"],
        "init_from": "a=b",
        "max_grad_norm": None,
        "output": "inf",
    }
    assert DOCUMENT["data"] == {"a": {"weight": 1}}


def test_values_of_a_mapping_are_taken_as_they_are() -> None:
    assert override(DOCUMENT, {"lr": "2e-5", "data.a.weight": [1]})["lr"] == "2e-5"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lr", "expected key=value"),
        ("=1", "expected key=value"),
        ("lr=[", "the value is not YAML"),
        ("lr.a=1", "override 'lr.a': lr has no keys below it"),
    ],
)
def test_settings_that_are_not_possible(setting: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        override(DOCUMENT, [setting])


def test_a_plan_from_whatever_names_it() -> None:
    plan, folder = read_plan("finetune_7b", {"lora.rank": 4, "train": ["projectors"]})
    assert plan.lora is not None
    assert (plan.lora.rank, plan.train, plan.lr) == (4, ["projectors"], 2e-5)
    found = Recipe.find("finetune_7b")
    assert found.source is not None
    assert folder == found.source.parent
    assert read_plan(found) == read_plan("finetune_7b")
    assert read_plan(dict(found.document)) == (read_plan(found)[0], None)
    assert isinstance(plan, TrainPlan)
    assert read_plan(plan) == (plan, None)
    with pytest.raises(RecipeError, match="sphinx_7b.yaml: expected kind train, got kind model"):
        read_plan("sphinx_7b")
    with pytest.raises(RecipeError, match="lr: must be positive, got -1"):
        read_plan("finetune_7b", ["lr=-1"])


def test_a_misspelt_key_of_the_recipe() -> None:
    with pytest.raises(RecipeError, match="override 'outptu': unknown key; did you mean 'output'"):
        read_plan("finetune_7b", ["outptu=runs/a"])
    with pytest.raises(RecipeError, match="keep.*keep_checkpoints"):  # an old name
        read_plan("finetune_7b", ["keep=1"])
