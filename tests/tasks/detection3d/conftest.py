"""Rooms with several views of a scene, and one short run on the rooms; both are made once and never changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tasks.detection3d.small import recipe

from tokenfusion import api


@pytest.fixture(scope="session")
def run(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Points and images."""
    out = tmp_path_factory.mktemp("runs") / "run"
    api.train(recipe(rooms), out)
    return out


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
