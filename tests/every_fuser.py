"""Every word of a recipe's fuser, with arguments under which small networks of generic weights exchange something."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenfusion.components import FUSER_GIVEN, FUSERS, maker
from tokenfusion.fusion import Fuser

LIVELY: dict[str, dict[str, Any]] = {  # generic scores lie around 0.5, generic scales of norms around 1
    "random": {"rate": 0.4},
    "channel": {"threshold": 1.0},
    "tokenfusion": {"threshold": 0.5},
    "tokenfusion-paper": {"threshold": 0.5},
    "token+channel": {"threshold": 0.5, "channel_threshold": 1.0},
}
SPECS = {word: {**spec, **LIVELY.get(word, {})} for word, spec in FUSERS.items()}
MAKERS: dict[str, Callable[..., Fuser]] = {word: maker(spec, word, FUSER_GIVEN) for word, spec in SPECS.items()}
SCORING = {word for word, make in MAKERS.items() if make(8, 2, 0).threshold is not None}
