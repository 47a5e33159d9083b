"""Training: recipes, the loop, checkpoints. May import layers, models and data."""

from strata.errors import DivergenceError
from strata.train.loop import StepEvent, TrainResult, train
from strata.train.metrics import read_metrics
from strata.train.optim import OptimConfig, ParameterGroups, RowOptimizer, parameter_groups
from strata.train.recipe import DataConfig, Recipe, RunConfig
from strata.train.schedule import ScheduleConfig, learning_rate_factor

__all__ = [
    "DataConfig",
    "DivergenceError",
    "OptimConfig",
    "ParameterGroups",
    "Recipe",
    "RowOptimizer",
    "RunConfig",
    "ScheduleConfig",
    "StepEvent",
    "TrainResult",
    "learning_rate_factor",
    "parameter_groups",
    "read_metrics",
    "train",
]
