"""The errors that sphinxkit raises on purpose.

Every message states what came, what was expected, and where (file, line, key or tensor).
"""


class SphinxkitError(Exception):
    """Base of every error that sphinxkit raises on purpose."""


class ShapeError(SphinxkitError, ValueError):
    """A tensor, width, grid or size does not fit; the message names both sides."""


class RegistryError(SphinxkitError, LookupError):
    """A component name is unknown or taken, or an option does not exist."""


class RecipeError(SphinxkitError, ValueError):
    """A recipe is not valid; the message lists every fault with its path in the file."""


class CheckpointError(SphinxkitError, RuntimeError):
    """A checkpoint is missing, damaged, unsafe or does not fit the model."""


class DataError(SphinxkitError, ValueError):
    """An input (image, conversation, prompt, annotation) cannot be used."""
