"""Fused multimodal transformers out of single-modal ones: TokenFusion (CVPR 2022)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tokenfusion.errors import UserError

if TYPE_CHECKING:
    from tokenfusion.api import load
    from tokenfusion.backbones.hub import FusedNetwork
    from tokenfusion.backbones.lockstep import FusedStreams
    from tokenfusion.networks import fuse
    from tokenfusion.recipe import read_recipe

__version__ = "0.1.0"
__all__ = [
    "FusedNetwork",
    "FusedStreams",
    "UserError",
    "fuse",
    "load",
    "read_recipe",
]  # what the command line does: tokenfusion.api, convert, export, bench and study


def __getattr__(name: str) -> Any:
    """Imported when asked for: torch takes seconds, and ``tokenfusion --help`` needs none of it."""
    homes = {
        "FusedNetwork": "tokenfusion.backbones.hub",
        "FusedStreams": "tokenfusion.backbones.lockstep",
        "fuse": "tokenfusion.networks",
        "load": "tokenfusion.api",
        "read_recipe": "tokenfusion.recipe",
    }
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(homes[name]), name)
