"""The training of SPHINX-nano's encoders, from random weights, before they are frozen."""

from sphinxkit.nano.perception.training import PerceptionPlan, train_encoders

__all__ = ["PerceptionPlan", "train_encoders"]
