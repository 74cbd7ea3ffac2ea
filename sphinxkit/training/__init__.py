"""Training: stages as recipes, any number of processes, exact resume."""

from sphinxkit.training.assembly import Assembly, assemble
from sphinxkit.training.errors import TrainingError
from sphinxkit.training.log import read_log
from sphinxkit.training.loop import TrainResult, train
from sphinxkit.training.optim import learning_rate
from sphinxkit.training.plan import LoraPlan, StreamPlan, TrainPlan
from sphinxkit.training.step import LossModule, NonFiniteError, StepLosses, TrainStep

__all__ = [
    "Assembly",
    "LoraPlan",
    "LossModule",
    "NonFiniteError",
    "StepLosses",
    "StreamPlan",
    "TrainPlan",
    "TrainResult",
    "TrainStep",
    "TrainingError",
    "assemble",
    "learning_rate",
    "read_log",
    "train",
]
