"""Errors of training runs."""

from sphinxkit.errors import SphinxkitError


class TrainingError(SphinxkitError, RuntimeError):
    """A run cannot start, continue or resume. Earlier checkpoints are intact."""
