"""SPHINX's claims, tested on small variants of SPHINX-nano."""

from sphinxkit.nano.ablations.report import reproduce_ablations
from sphinxkit.nano.ablations.run import AblationPlan, read_results, run_ablations

__all__ = ["AblationPlan", "read_results", "reproduce_ablations", "run_ablations"]
