"""SPHINX-nano: all of SPHINX at a few million parameters, with trained weights in the package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sphinxkit.hub import TITLE as NAME
from sphinxkit.hub import nano_folder as path
from sphinxkit.nano.familiarity import unfamiliar

if TYPE_CHECKING:
    from sphinxkit.sphinx_model import SphinxModel

__all__ = ["NAME", "load", "path", "unfamiliar"]


def load(**options: Any) -> SphinxModel:
    """Load SPHINX-nano; ``sphinxkit.nano.load().chat([{"role": "user", "content": question}], image)``.

    Args:
        options: Options of ``sphinxkit.load`` (``device``, ``dtype``, ...).
    Raises:
        CheckpointError: This installation was made without the weights, or they are damaged.
    """
    from sphinxkit.recipe.io import load as load_model

    return load_model(path(), **options)
