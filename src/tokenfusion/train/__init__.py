"""Training: one loop for every task, exact resume, safe checkpoints. ``fit`` is the door."""

from __future__ import annotations

from tokenfusion.train.checkpoint import Checkpoints, load_model
from tokenfusion.train.engine import Engine
from tokenfusion.train.log import jsonable, warn
from tokenfusion.train.loop import FitResult, fit, train_step
from tokenfusion.train.optim import Optimizers
from tokenfusion.train.settings import WITHOUT_EFFECT_ON_WEIGHTS, Restart, TrainSettings, train_settings
from tokenfusion.train.task import ParameterGroup, Task, by_decay, without_decay

__all__ = [
    "WITHOUT_EFFECT_ON_WEIGHTS",
    "Checkpoints",
    "Engine",
    "FitResult",
    "Optimizers",
    "ParameterGroup",
    "Restart",
    "Task",
    "TrainSettings",
    "by_decay",
    "fit",
    "jsonable",
    "load_model",
    "train_settings",
    "train_step",
    "warn",
    "without_decay",
]
