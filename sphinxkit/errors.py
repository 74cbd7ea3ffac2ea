"""The errors that sphinxkit raises on purpose.

Every message states what came, what was expected, and where (file, line, key or tensor).
"""

from collections.abc import Sequence

_MAX_LISTED = 50  # errors named one by one in a message; our choice


class SphinxkitError(Exception):
    """Base of every error that sphinxkit raises on purpose."""


class ShapeError(SphinxkitError, ValueError):
    """A tensor, width, grid or size does not fit; the message names both sides."""


class RegistryError(SphinxkitError, LookupError):
    """A component name is unknown or taken, or an option does not exist."""


class RecipeError(SphinxkitError, ValueError):
    """A recipe is not valid; the message lists everything that is wrong, with its path in the file."""


class CheckpointError(SphinxkitError, RuntimeError):
    """A checkpoint is missing, damaged, unsafe or does not fit the model."""


class DataError(SphinxkitError, ValueError):
    """An input (image, conversation, prompt, annotation) cannot be used."""


def list_errors(what: str, errors: Sequence[str]) -> str:
    """A message that lists ``errors``.

    Args:
        what: Start of the message: the file or folder and what is wrong with it.
        errors: One line each; more than fifty are cut short, with their number.
    """
    listed = "".join(f"\n  - {error}" for error in errors[:_MAX_LISTED])
    rest = len(errors) - _MAX_LISTED
    return f"{what}:{listed}" + (f"\n  ... and {rest} more" if rest > 0 else "")


def raise_errors(what: str, errors: Sequence[str]) -> None:
    """Raise one error that lists ``errors``; nothing happens when there are none.

    Args:
        what: As for :func:`list_errors`.
        errors: Their messages.
    Raises:
        CheckpointError: ``errors`` is not empty.
    """
    if errors:
        raise CheckpointError(list_errors(what, errors))
