"""SphinxModel: a language model with eyes."""

from __future__ import annotations

from sphinxkit.sphinx_model.model import SphinxModel
from sphinxkit.sphinx_model.prompts import ImageInput, Prompt
from sphinxkit.sphinx_model.scoring import Score
from sphinxkit.sphinx_model.session import ChatSession

__all__ = ["ChatSession", "ImageInput", "Prompt", "Score", "SphinxModel"]
