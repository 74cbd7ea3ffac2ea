"""Keys that were renamed: errors in recipes, translated in runs that exist."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from sphinxkit.errors import RecipeError
from sphinxkit.recipe import Recipe
from sphinxkit.training import TrainPlan, read_log, train
from sphinxkit.training.plan_keys import FREE_KEYS, RENAMED_KEYS, RENAMED_PARTS, changed_keys, translate_saved


def test_new_names_exist_and_old_ones_do_not() -> None:
    names = {field.name for field in dataclasses.fields(TrainPlan)}
    assert set(RENAMED_KEYS.values()) <= names
    assert not set(RENAMED_KEYS) & names
    assert names >= FREE_KEYS


@pytest.mark.parametrize(("old", "new"), list(RENAMED_KEYS.items()))
def test_an_old_key_of_a_recipe_is_an_error_that_gives_the_new_one(document, old: str, new: str) -> None:
    with pytest.raises(RecipeError, match=f"{old}: is now called '{new}'"):
        Recipe({"kind": "train", **document()} | {old: 1})


def test_an_old_part_is_an_error_that_gives_the_new_one(document) -> None:
    for changes in ({"train": ["tags"]}, {"lr_scale": {"tags": 1.0}}):
        with pytest.raises(RecipeError, match="'tags' is now called 'image_delimiters'"):
            Recipe({"kind": "train", **document(**changes)})


def test_a_saved_plan_is_translated() -> None:
    saved = {"clip": 8.0, "train": ["llm", "tags"], "lr_scale": {"tags": 0.5}, "init": None, "lr": 1.0}
    assert translate_saved(saved) == {
        "max_grad_norm": 8.0,
        "train": ["llm", "image_delimiters"],
        "lr_scale": {"image_delimiters": 0.5},
        "init_from": None,
        "lr": 1.0,
    }


def test_a_run_that_older_names_saved_is_resumed(document, straight: Path) -> None:
    train(TrainPlan(**document(stop_after=3)))
    path = Path(document()["output"]) / "checkpoints" / "step-00000003" / "run.json"
    run = json.loads(path.read_text())
    olds = {new: old for old, new in RENAMED_KEYS.items()}
    run["plan"] = {olds.get(key, key): value for key, value in run["plan"].items() if key != "dp_replicate"}
    parts = {new: old for old, new in RENAMED_PARTS.items()}
    run["plan"]["train"] = [parts.get(part, part) for part in run["plan"]["train"]]
    assert {"clip", "init", "tags"} <= {*run["plan"], *run["plan"]["train"]}
    del run["model"]["llm"]["norm_eps"]  # as if the option had come later
    path.write_text(json.dumps(run))
    assert train(TrainPlan(**document())).status == "done"
    losses = [[record["loss"] for record in read_log(folder)] for folder in (Path(document()["output"]), straight)]
    assert losses[0] == losses[1]


def test_changed_keys() -> None:
    old = {"lr": 1, "output": "a", "num_workers": 2, "data": {"a": {"weight": 1, "num_workers": 1}}}
    new = {"lr": 2, "output": "b", "num_workers": 3, "data": {"a": {"weight": 3, "num_workers": 2}}, "betas": None}
    assert changed_keys(old, new) == [
        "betas: '(absent)' -> None",
        "data.a.num_workers: 1 -> 2",
        "data.a.weight: 1 -> 3",
        "lr: 1 -> 2",
    ]
