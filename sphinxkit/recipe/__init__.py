"""Recipes: schema, model building, loading and saving.

The other public functions of this family (``mix``, ``diff``, ``check``, ...) are ``sphinxkit``'s; each is imported from
its own module, so that loading a model does not import how models are mixed.
"""

from sphinxkit.recipe.build import build
from sphinxkit.recipe.io import load
from sphinxkit.recipe.recipe import Recipe, shipped_folder, shipped_recipes

__all__ = ["Recipe", "build", "load", "shipped_folder", "shipped_recipes"]
