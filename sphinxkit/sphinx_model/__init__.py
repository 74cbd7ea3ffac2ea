"""SphinxModel: a language model that reads images."""

from __future__ import annotations

from sphinxkit.sphinx_model.answers import TaskAnswer
from sphinxkit.sphinx_model.images import ImageInput
from sphinxkit.sphinx_model.model import SphinxModel
from sphinxkit.sphinx_model.prompts import Prompt
from sphinxkit.sphinx_model.scoring import Score
from sphinxkit.sphinx_model.session import ChatSession

__all__ = ["ChatSession", "ImageInput", "Prompt", "Score", "SphinxModel", "TaskAnswer"]
