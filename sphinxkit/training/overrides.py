"""Reads a plan and applies overrides."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sphinxkit.checkpoint.yaml_limits import check_yaml, make_yaml
from sphinxkit.errors import RecipeError
from sphinxkit.recipe import Recipe
from sphinxkit.registry import suggest
from sphinxkit.training.plan import TrainPlan
from sphinxkit.training.plan_keys import RENAMED_KEYS

Overrides = Mapping[str, Any] | Sequence[str]
"""``{"lr": 1e-4, "data.text.weight": 0.5}``, or ``["lr=1e-4", "data.text.weight=0.5"]`` with YAML values."""

_FLOAT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")  # YAML 1.1 wants a dot in 2e-5, people do not write one


def read_plan(
    recipe: str | Path | Mapping[str, Any] | Recipe | TrainPlan, overrides: Overrides | None = None
) -> tuple[TrainPlan, Path | None]:
    """Read the plan of a train recipe; returns it with the base folder of its paths.

    Args:
        recipe: A shipped name, a file, a document, a recipe, or a plan.
        overrides: Keys to replace.
    Raises:
        RecipeError: There is no such recipe, it is of another kind, an override is not possible, or the recipe is not
            valid with it.
    """
    found = Recipe(recipe.document()) if isinstance(recipe, TrainPlan) else Recipe.find(recipe)
    found.of_kind("train")
    if overrides:
        changed = override(found.document, overrides)
        known = [field.name for field in dataclasses.fields(TrainPlan)]
        for key in sorted(changed.keys() - found.document.keys() - {*known, *RENAMED_KEYS}):
            if hint := suggest(key, known):  # also of a key that the recipe has: it is to be replaced
                raise RecipeError(f"override {key!r}: unknown key{hint}")
        found = Recipe(changed, found.source)
    plan = TrainPlan(**{key: value for key, value in found.document.items() if key != "kind"})
    return plan, None if found.source is None else found.source.parent


def override(document: Mapping[str, Any], overrides: Overrides) -> dict[str, Any]:
    """Return a document with some keys replaced.

    Args:
        document: Recipe document; not changed.
        overrides: Keys to replace; a dot separates levels.
    Raises:
        RecipeError: A setting without ``=``, a value that is not YAML, or a key below something that has no keys.
    """
    pairs = dict(overrides) if isinstance(overrides, Mapping) else dict(_parse(setting) for setting in overrides)
    changed: dict[str, Any] = _copy(document)
    for key, value in pairs.items():
        holder = changed
        *path, last = key.split(".")
        for name in path:
            if holder.get(name) is None:
                holder[name] = {}
            holder = holder[name]
            if not isinstance(holder, dict):
                raise RecipeError(f"override {key!r}: {name} has no keys below it")
        holder[last] = value
    return changed


def _parse(setting: str) -> tuple[str, Any]:
    import yaml

    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {setting!r}: expected key=value")
    try:
        check_yaml(text)
        value = make_yaml(text)
    except (ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"override {setting!r}: the value is not YAML: {error}") from error
    return key, float(value) if isinstance(value, str) and _FLOAT.fullmatch(value) else value


def _copy(value: Any) -> Any:
    return {key: _copy(nested) for key, nested in value.items()} if isinstance(value, Mapping) else value
