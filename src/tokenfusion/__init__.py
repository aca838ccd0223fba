"""Fused multimodal transformers out of single-modal ones: TokenFusion (CVPR 2022)."""

from tokenfusion.api import evaluate, load, predict, prepare, prepare_rooms, train
from tokenfusion.errors import UserError
from tokenfusion.recipe import read_recipe

__version__ = "0.1.0"
__all__ = ["UserError", "evaluate", "load", "predict", "prepare", "prepare_rooms", "read_recipe", "train"]
