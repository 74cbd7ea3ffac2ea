from __future__ import annotations

import json
from typing import Any

import pytest

from sphinxkit.errors import RecipeError
from sphinxkit.recipe import Recipe, shipped_recipes
from sphinxkit.training import LoraPlan, StreamPlan, TrainPlan
from sphinxkit.training.plan import changed_keys

# SPHINX-nano's recipes, in a folder of their own, are our choice of everything
STAGES = [name for name in shipped_recipes() if "/" not in name and Recipe.find(name).kind == "train"]
MINIMUM: dict[str, Any] = {"model": "sphinx_7b", "data": {"a": {"mixture": "m", "batch_size": 1}}, "output": "out"}


def test_there_are_stages() -> None:
    assert {"pretrain_13b", "pretrain_7b", "pretrain_synthetic_13b", "finetune_13b", "finetune_1k_13b"} <= set(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_published_values(name: str) -> None:
    """Source: SPHINX, arXiv:2311.07575, and its authors' training scripts."""
    document = dict(Recipe.find(name).document)
    assert document.pop("kind") == "train"
    plan = TrainPlan(**document)
    assert (plan.betas, plan.lr, plan.min_lr, plan.warmup) == ((0.9, 0.95), 2e-5, 0.0, 0.03)
    assert (plan.weight_decay, plan.clip, plan.dtype, plan.epochs) == (0.0, 8.0, "bfloat16", 1.0)
    assert sum(stream.batch_size for stream in plan.data.values()) == 128
    assert "encoders" not in plan.train
    assert Recipe.find(plan.model).kind == "model"
    for stream in plan.data.values():
        mixture = stream.mixture if isinstance(stream.mixture, dict) else dict(Recipe.find(stream.mixture).document)
        Recipe({"kind": "mixture"} | mixture)
    if name.startswith("pretrain"):
        kinds = {key: {s.get("type", "image-text") for s in v.mixture["sources"]} for key, v in plan.data.items()}
        assert kinds == {"captions": {"image-text"}, "text": {"text"}}


def test_nested_plans_are_built() -> None:
    plan = TrainPlan(**MINIMUM | {"train": ["projectors"], "lora": {"rank": 2}, "betas": [0.5, 0.6]})
    assert plan.data == {"a": StreamPlan("m", 1)}
    assert plan.lora == LoraPlan(rank=2)
    assert plan.betas == (0.5, 0.6)
    assert TrainPlan(**{key: value for key, value in plan.document().items() if key != "kind"}) == plan
    assert json.loads(json.dumps(plan.document())) == plan.document()
    Recipe(plan.document())
    assert TrainPlan(**MINIMUM, init="x").checkpoints == ["x"]
    assert TrainPlan(**MINIMUM, init=["x", "y"]).checkpoints == ["x", "y"]
    assert TrainPlan(**MINIMUM).checkpoints == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "lr: must be positive, got 0.0"),
        ({"keep": 0}, "keep: must be at least 1, got 0"),
        ({"steps": 0}, "steps: must be at least 1, got 0"),
        ({"data": {}}, "data: name at least one stream"),
        ({"data": {"a": {"mixture": "m", "batch_size": 0}}}, "data.a.batch_size: must be at least 1, got 0"),
        ({"data": {"a": StreamPlan("m", 1, weight=0.0)}}, "data.a.weight: must be positive, got 0.0"),
        ({"data": {"a": {"mixtur": "m"}}}, "data.a.mixtur: unknown key; did you mean 'mixture'"),
        ({"data": {"a": {"mixture": "m"}}}, "data.a: .*batch_size"),
        ({"train": ["llms"]}, "train: expected parts of .* got 'llms'; did you mean 'llm'"),
        ({"train": []}, "train: nothing would be trained"),
        ({"lr_scale": {"vision": 1.0}}, "lr_scale: expected parts of"),
        ({"lora": {}}, "lora, train: low-rank updates leave the language model frozen"),
        ({"lora": {}, "train": [], "tensor_parallel": 2}, "lora, tensor_parallel: .* use fsdp"),
        ({"lora": {"ranks": 2}, "train": []}, "lora.ranks: unknown key; did you mean 'rank'"),
        ({"warmup": 1.0}, r"warmup: expected a share of the steps in \[0, 1\), got 1.0"),
        ({"betas": [0.9, 1.0]}, r"betas: expected two numbers in \[0, 1\), got \[0.9, 1.0\]"),
        ({"min_lr": 1.0}, "min_lr: expected between 0 and lr, got 1.0"),
        ({"workers": -1}, "weight_decay, workers: must not be negative"),
        ({"clip": 0.0}, "clip: must be positive or null, got 0.0"),
        ({"dtype": "float16"}, "dtype: expected bfloat16 or float32, got 'float16'"),
        ({"on_nonfinite": "go"}, "on_nonfinite: expected stop or skip, got 'go'"),
    ],
)
def test_faults(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        TrainPlan(**MINIMUM | changes)


def test_all_faults_come_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        TrainPlan(**MINIMUM | {"lr": -1.0, "keep": 0, "train": ["x"]})
    assert len(str(caught.value).splitlines()) == 4  # min_lr is above lr, too


def test_faults_of_a_recipe_have_their_paths() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe(
            {
                "kind": "train",
                "model": {"kind": "model", "llm": "llama2_13"},
                "data": {"a": {"mixture": {"sources": [], "batch": 2}, "batch_size": 1, "wieght": 2}},
                "output": "out",
                "lrr": 1,
            }
        )
    message = str(caught.value)
    for line in (
        "data.a.wieght:",
        "lrr: unknown key; did you mean 'lr'",
        "model.llm: unknown",
        "data.a.mixture.batch:",
    ):
        assert line in message


def test_changed_keys() -> None:
    old = {"lr": 1, "output": "a", "workers": 2, "data": {"a": {"weight": 1, "workers": 1}}}
    new = {"lr": 2, "output": "b", "workers": 3, "data": {"a": {"weight": 3, "workers": 2}}, "clip": None}
    assert changed_keys(old, new) == [
        "clip: '(absent)' -> None",
        "data.a.weight: 1 -> 3",
        "data.a.workers: 1 -> 2",
        "lr: 1 -> 2",
    ]
