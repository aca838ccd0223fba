"""Small rooms; they are drawn once and never changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tokenfusion import api


@pytest.fixture(scope="session")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "rooms"
    api.prepare_rooms(out, train=6, val=3, height=32, width=64, seed=1)
    return out


@pytest.fixture
def broken(rooms: Path, tmp_path: Path) -> Path:
    """A copy of the rooms that a test may damage."""
    return Path(shutil.copytree(rooms, tmp_path / "rooms"))
