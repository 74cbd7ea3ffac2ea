"""SPHINX-nano's training stages, from random weights to scores."""

from sphinxkit.nano.stages.reproduce import STAGES, reproduce_nano

__all__ = ["STAGES", "reproduce_nano"]
