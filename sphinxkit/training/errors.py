"""What stops a training run on purpose."""

from sphinxkit.errors import SphinxkitError


class TrainingError(SphinxkitError, RuntimeError):
    """A run cannot start, go on or be resumed; what was saved before is intact."""
