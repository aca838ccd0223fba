"""Fused multimodal transformers out of single-modal ones: TokenFusion (CVPR 2022)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tokenfusion.errors import UserError

if TYPE_CHECKING:
    from tokenfusion.api import evaluate, load, predict, prepare, prepare_rooms, train
    from tokenfusion.recipe import read_recipe

__version__ = "0.1.0"
__all__ = ["UserError", "evaluate", "load", "predict", "prepare", "prepare_rooms", "read_recipe", "train"]


def __getattr__(name: str) -> Any:
    """The verbs are imported when they are asked for: torch takes seconds, and ``tokenfusion --help`` needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("tokenfusion.recipe" if name == "read_recipe" else "tokenfusion.api"), name)
