"""Recipe files: what they may say, how they are assembled, how models are loaded and saved."""

from sphinxkit.recipe.build import build
from sphinxkit.recipe.io import load
from sphinxkit.recipe.mixing import MixResult, mix
from sphinxkit.recipe.recipe import Recipe, shipped_folder, shipped_recipes

__all__ = ["MixResult", "Recipe", "build", "load", "mix", "shipped_folder", "shipped_recipes"]
