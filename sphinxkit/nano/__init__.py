"""SPHINX-nano: all of SPHINX at a few million parameters, with trained weights in the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sphinxkit.errors import CheckpointError

if TYPE_CHECKING:
    from sphinxkit.sphinx_model import SphinxModel

__all__ = ["NAME", "load", "path"]

NAME = "SPHINX-nano"
_FOLDER = "weights"
_FILES = ("recipe.yaml", "tokenizer.model", "model.safetensors.index.json")  # and the tensors that the index names


def path() -> Path:
    """Folder of the checkpoint that comes with the package, in sphinxkit's own layout.

    Raises:
        CheckpointError: This installation was made without it; names what is missing.
    """
    folder = Path(str(resources.files("sphinxkit.nano"))) / _FOLDER
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if not any(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise CheckpointError(
            f"{folder}: this installation comes without {NAME}'s weights (missing: {', '.join(missing)}); "
            "name another checkpoint, or train it (sphinxkit reproduce nano)"
        )
    return folder


def load(**options: Any) -> SphinxModel:
    """Load SPHINX-nano; ``sphinxkit.nano.load().chat([{"role": "user", "content": question}], image)``.

    Args:
        options: Options of ``sphinxkit.load`` (``device``, ``dtype``, ...).
    Raises:
        CheckpointError: This installation was made without the weights, or they are damaged.
    """
    from sphinxkit.recipe.io import load as load_model

    return load_model(path(), **options)
