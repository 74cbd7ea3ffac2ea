"""The recipes of ``recipes/nano``: found by name, resolved beside each other, and fitting one another."""

from __future__ import annotations

import json

import pytest

from sphinxkit.errors import RecipeError
from sphinxkit.formatters import create as create_template
from sphinxkit.nano.stages.steps import recipes, training_plan
from sphinxkit.nano.world import World
from sphinxkit.recipe import Recipe, build
from sphinxkit.tokenizer import Tokenizer
from sphinxkit.training.overrides import read_plan
from sphinxkit.training.plan_keys import changed_keys, translate_saved
from sphinxkit.training.trainable_model import find_recipe

MODELS = ("nano/model", "nano/model_subimages")
STAGES = (
    *("pretrain_real", "pretrain_synthetic", "finetune", "finetune_more", "finetune_vqa"),
    *("finetune_subimages", "finetune_any_size", "finetune_choices"),
    *("finetune_sizes_and_choices", "finetune_hard_choices", "finetune_lookups"),
    *("finetune_letters", "finetune_words", "finetune_together"),
)
STARTS = (
    "encoders/model",
    "pretrain_real/model",
    "mixed",
    "finetune/model",
    "finetune_more/model",
    "finetune_vqa/model",
    "finetune_subimages/model",
    "mixed_any_size/model",
    "mixed_choices/model",
    "mixed_sizes_and_choices/model",
    "finetune_hard_choices/model",
    "mixed_lookups/model",
    "finetune_letters/model",
    "finetune_words/model",
)


def test_nested_names_are_found() -> None:
    found = Recipe.find("nano/finetune")
    assert found.kind == "train"
    assert found.source == recipes() / "finetune.yaml"
    with pytest.raises(RecipeError, match=r"no recipe 'nano/finetun'.*did you mean 'nano/finetune'"):
        Recipe.find("nano/finetun")


@pytest.mark.parametrize("name", STAGES)
def test_train_finds_the_model_beside_the_recipe(name: str) -> None:
    plan, folder = read_plan(f"nano/{name}", {"steps": 2})
    assert plan.steps == 2
    expected = "model_subimages.yaml" if name in STAGES[-9:] else "model.yaml"
    assert find_recipe(plan, folder).source == recipes() / expected


@pytest.mark.parametrize(("name", "start"), list(zip(STAGES, STARTS, strict=True)))
def test_every_stage_starts_where_the_one_before_ends(name: str, start: str) -> None:
    plan = training_plan(name, "some/where")
    assert plan.init_from == f"some/where/{start}"
    assert plan.output == f"some/where/{name}"


def test_sub_images_change_nothing_else() -> None:
    one, many = (build(Recipe.find(name), device="meta") for name in MODELS)
    assert one.state_dict().keys() == many.state_dict().keys()
    assert all(many.state_dict()[key].shape == tensor.shape for key, tensor in one.state_dict().items())
    assert one.vision is not None
    assert many.vision is not None
    assert many.vision.num_tokens == 5 * one.vision.num_tokens
    assert one.llm.vocab_size == Tokenizer(recipes() / "tokenizer.model").vocab_size


@pytest.mark.parametrize(
    ("name", "size", "grid"),
    [
        ("finetune", 64, None),
        ("finetune_subimages", 128, 128),
        ("finetune_any_size", 128, 128),
        ("finetune_choices", 128, 128),
        ("finetune_sizes_and_choices", 128, 128),
        ("finetune_hard_choices", 128, 128),
        ("finetune_lookups", 128, 128),
        ("finetune_together", 128, 128),
    ],
)
def test_conversations_fit(name: str, size: int, grid: int | None) -> None:
    plan = training_plan(name, "runs")
    mixture = plan.data["tasks"].mixture
    assert isinstance(mixture, dict)
    assert mixture["size"] == size
    assert mixture.get("options", {}).get("point_grid") == grid
    turns = max(source.get("num_turns", 1) for source in mixture["sources"])
    model = build(find_recipe(plan, recipes()), device="meta")
    assert model.vision is not None
    assert model.vision.image_size == size
    tokenizer, template = Tokenizer(recipes() / "tokenizer.model"), create_template("sphinx_v1")
    world = World(size=size, point_grid=grid)
    longest = max(
        len(template.encode(world.conversation(index, "all", turns)[1], tokenizer).token_ids) for index in range(120)
    )
    assert plan.max_tokens is not None
    assert longest + model.vision.num_tokens < plan.max_tokens <= model.llm.max_seq_len


def test_runs_that_were_saved_before_the_world_moved_are_resumed() -> None:
    now = training_plan("finetune_subimages", "out").document()
    old = json.loads(json.dumps(now).replace("sphinxkit.nano.world:", "sphinxkit.data.procedural:"))
    assert changed_keys(old, now)
    assert changed_keys(translate_saved(old), now) == []
