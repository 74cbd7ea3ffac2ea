"""Training: stages as recipes, any number of processes, exact resume."""

from sphinxkit.training.callbacks import Callback, ProgressReport, TrainResult
from sphinxkit.training.errors import TrainingError
from sphinxkit.training.log_records import read_log
from sphinxkit.training.optim import learning_rate
from sphinxkit.training.plan import LoraPlan, StreamPlan, TrainPlan
from sphinxkit.training.run import train
from sphinxkit.training.step import LossModule, NonFiniteError, StepLosses, TrainStep
from sphinxkit.training.trainable_model import TrainableModel, build_trainable

__all__ = [
    "Callback",
    "LoraPlan",
    "LossModule",
    "NonFiniteError",
    "ProgressReport",
    "StepLosses",
    "StreamPlan",
    "TrainPlan",
    "TrainResult",
    "TrainStep",
    "TrainableModel",
    "TrainingError",
    "build_trainable",
    "learning_rate",
    "read_log",
    "train",
]
