"""Validates recipes: ``sphinxkit.check``."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sphinxkit.errors import RecipeError
from sphinxkit.hub import is_hub_path
from sphinxkit.recipe.build import build
from sphinxkit.recipe.inspection import is_checkpoint, recipe_of
from sphinxkit.recipe.recipe import Recipe
from sphinxkit.recipe.schema import stream_mixtures
from sphinxkit.recipe.weights import beside, check_init_from
from sphinxkit.registry import no_imports


@dataclass(frozen=True)
class CheckedRecipe:
    """A recipe that is valid.

    Attributes:
        recipe: The recipe.
        num_parameters: Of a model, of all parts; None for other kinds.
        num_image_tokens: Of a model, of one image; None for other kinds.
    """

    recipe: Recipe
    num_parameters: int | None = None
    num_image_tokens: int | None = None

    @property
    def kind(self) -> str:
        """``model``, ``train``, ``mixture`` or ``mix``."""
        return self.recipe.kind


def check(recipe: str | Path | Mapping[str, Any] | Recipe, *, trust: bool = False) -> CheckedRecipe:
    """Check a recipe; a model is also built without memory.

    Args:
        recipe: A shipped name, a path, a dict or a Recipe, of any kind.
        trust: Whether code that the recipe names (``package.module:builder``) may be imported and called.
    Raises:
        RecipeError: The recipe is not valid, or names code without ``trust``; the message lists
            every error with its path.
        ShapeError: The parts of the model do not fit each other.
    """
    with nullcontext() if trust else no_imports():
        found = Recipe.find(recipe)
        if found.kind == "train":
            _check_model(found, trust)
            check_init_from(found)
            _check_mixtures(found)
        if found.kind != "model":
            return CheckedRecipe(found)
        model = build(found, device="meta")
        count = sum(parameter.numel() for parameter in model.parameters())
        return CheckedRecipe(found, count, 0 if model.vision is None else model.vision.num_tokens)


def _check_mixtures(recipe: Recipe) -> None:
    """Find the mixtures that the streams of a stage name."""
    folder = None if recipe.source is None else recipe.source.parent
    for path, mixture in stream_mixtures(recipe.document):
        if isinstance(mixture, str):
            try:
                Recipe.find_written(beside(folder, mixture)).of_kind("mixture")
            except RecipeError as error:
                raise RecipeError(f"{'.'.join(map(str, path))}: {error}") from error


def _check_model(recipe: Recipe, trust: bool) -> None:
    """Find the model that a stage trains; a hub is not asked."""
    model = recipe.document["model"]
    if isinstance(model, str) and not is_hub_path(model):
        model = beside(None if recipe.source is None else recipe.source.parent, model)
        recipe_of(model, trust) if is_checkpoint(model) else Recipe.find_written(model)
