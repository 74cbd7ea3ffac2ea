from __future__ import annotations

import json
from typing import Any

import pytest

from sphinxkit.errors import RecipeError
from sphinxkit.recipe import Recipe, shipped_recipes
from sphinxkit.training import LoraPlan, StreamPlan, TrainPlan

# SPHINX-nano's recipes, in a folder of their own, are our choice of everything
STAGES = [name for name in shipped_recipes() if "/" not in name and Recipe.find(name).kind == "train"]
MINIMUM: dict[str, Any] = {"model": "sphinx_7b", "data": {"a": {"mixture": "m", "batch_size": 1}}, "output": "out"}


def test_there_are_stages() -> None:
    assert {"pretrain_13b", "pretrain_7b", "pretrain_synthetic_13b", "finetune_13b", "finetune_1k_13b"} <= set(STAGES)


def stage(name: str) -> TrainPlan:
    document = dict(Recipe.find(name).document)
    assert document.pop("kind") == "train"
    return TrainPlan(**document)


@pytest.mark.parametrize("name", [name for name in STAGES if name.startswith("finetune")])
def test_published_values_of_fine_tuning(name: str) -> None:
    """Source: LLaMA2-Accessory, SPHINX's fine-tuning scripts."""
    plan = stage(name)
    assert (plan.betas, plan.lr, plan.min_lr, plan.warmup_ratio) == ((0.9, 0.95), 2e-5, 0.0, 0.03)
    assert (plan.weight_decay, plan.max_grad_norm, plan.dtype, plan.epochs) == (0.0, 8.0, "bfloat16", 1.0)
    assert sum(stream.batch_size for stream in plan.data.values()) == 128
    assert "encoders" not in plan.train


@pytest.mark.parametrize("name", [name for name in STAGES if name.startswith("pretrain")])
def test_pretraining_is_fine_tuning_on_captions_and_text(name: str) -> None:
    """Our choice of every number: what fine-tuning publishes. From the paper: text beside captions, frozen encoders."""
    plan, tuning = stage(name), stage(f"finetune_{name.rpartition('_')[2]}")
    for key in ("betas", "lr", "min_lr", "warmup_ratio", "weight_decay", "max_grad_norm", "dtype", "epochs", "train"):
        assert getattr(plan, key) == getattr(tuning, key), key
    assert sum(stream.batch_size for stream in plan.data.values()) == 128
    kinds = {key: {s.get("type", "image-text") for s in v.mixture["sources"]} for key, v in plan.data.items()}
    assert kinds == {"captions": {"image-text"}, "text": {"text"}}
    text = shipped_recipes()[name].read_text()
    assert "very number is our choice" in text
    assert "# Published" not in text


@pytest.mark.parametrize("name", STAGES)
def test_models_and_mixtures_of_stages_exist(name: str) -> None:
    plan = stage(name)
    assert Recipe.find(plan.model).kind == "model"
    for stream in plan.data.values():
        mixture = stream.mixture if isinstance(stream.mixture, dict) else dict(Recipe.find(stream.mixture).document)
        Recipe({"kind": "mixture"} | mixture)


def test_nested_plans_are_built() -> None:
    plan = TrainPlan(**MINIMUM | {"train": ["projectors"], "lora": {"rank": 2}, "betas": [0.5, 0.6]})
    assert plan.data == {"a": StreamPlan("m", 1)}
    assert plan.lora == LoraPlan(rank=2)
    assert plan.betas == (0.5, 0.6)
    assert TrainPlan(**{key: value for key, value in plan.document().items() if key != "kind"}) == plan
    assert json.loads(json.dumps(plan.document())) == plan.document()
    Recipe(plan.document())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "lr: must be positive, got 0.0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints: must be at least 1, got 0"),
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
        ({"lora": {}, "train": [], "tensor_parallel": 2}, "lora, tensor_parallel: .* use dp_shard"),
        ({"lora": {"ranks": 2}, "train": []}, "lora.ranks: unknown key; did you mean 'rank'"),
        ({"warmup_ratio": 1.0}, r"warmup_ratio: expected a share in \[0, 1\), got 1.0"),
        ({"betas": [0.9, 1.0]}, r"betas: expected two numbers in \[0, 1\), got \[0.9, 1.0\]"),
        ({"min_lr": 1.0}, "min_lr: expected between 0 and lr, got 1.0"),
        ({"num_workers": -1}, "num_workers: must not be negative, got -1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm: must be positive or null, got 0.0"),
        ({"dtype": "float16"}, "dtype: expected bfloat16 or float32, got 'float16'"),
        ({"on_nonfinite": "go"}, "on_nonfinite: expected stop or skip, got 'go'"),
    ],
)
def test_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        TrainPlan(**MINIMUM | changes)


def test_all_errors_come_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        TrainPlan(**MINIMUM | {"lr": -1.0, "keep_checkpoints": 0, "train": ["x"]})
    assert len(str(caught.value).splitlines()) == 4  # min_lr is above lr, too


def test_errors_of_a_recipe_have_their_paths() -> None:
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
