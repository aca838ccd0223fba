"""A run of a few steps for every kind of target; runs are made once and never changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tasks.translation.nano import recipe

from tokenfusion import api


@pytest.fixture(scope="session")
def trained(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``trained(target)``: the folder of a run that makes it, see ``nano.TASKS``."""
    made: dict[str, Path] = {}

    def run(target: str) -> Path:
        if target not in made:
            made[target] = tmp_path_factory.mktemp("runs") / target
            api.train(recipe(rooms, target), made[target])
        return made[target]

    return run


@pytest.fixture
def run(trained: Callable[[str], Path]) -> Path:
    """rgb + depth -> normals."""
    return trained("normal")
