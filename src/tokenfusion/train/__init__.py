"""Training: one loop for every task, exact resume, safe checkpoints. ``fit`` is the door."""

from __future__ import annotations

from tokenfusion.train.checkpoint import Checkpoints, load_model
from tokenfusion.train.engine import Engine
from tokenfusion.train.loop import FitResult, fit
from tokenfusion.train.settings import WITHOUT_EFFECT_ON_WEIGHTS, Restart, TrainSettings, train_settings
from tokenfusion.train.task import ParameterGroup, Task

__all__ = [
    "WITHOUT_EFFECT_ON_WEIGHTS",
    "Checkpoints",
    "Engine",
    "FitResult",
    "ParameterGroup",
    "Restart",
    "Task",
    "TrainSettings",
    "fit",
    "load_model",
    "train_settings",
]
