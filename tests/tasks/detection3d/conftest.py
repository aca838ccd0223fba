"""Small rooms, with one view of a scene or several, and one short run on them; all are made once and never changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tasks.detection3d.small import recipe

from tokenfusion import api


@pytest.fixture(scope="session")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "rooms"
    api.prepare_rooms(out, train=6, val=3, height=32, width=64, seed=1)
    return out


@pytest.fixture(scope="session")
def run(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Points and images."""
    out = tmp_path_factory.mktemp("runs") / "run"
    api.train(recipe(rooms), out)
    return out


@pytest.fixture
def broken(rooms: Path, tmp_path: Path) -> Path:
    """A copy of the rooms that a test may damage."""
    return Path(shutil.copytree(rooms, tmp_path / "rooms"))


@pytest.fixture(scope="session")
def views(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rooms with three, two and no views of a scene: their own image, and the same from a little beside."""
    copy = tmp_path_factory.mktemp("views") / "rooms"
    shutil.copytree(rooms, copy)
    for number, path in enumerate(sorted((copy / "camera").glob("*.json"))):
        camera = json.loads(path.read_text())
        found = []
        for row in range((3, 2, 0)[number % 3]):
            pose = np.array(camera["pose"])
            pose[0, 3] += 0.2 * row
            found.append({"image": f"rgb/{path.stem}.png", "K": camera["K"], "pose": pose.tolist()})
        path.write_text(json.dumps({"views": found}))
    return copy
