"""Points with their colours: into training, evaluation and prediction, where a recipe asks for them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tasks.detection3d.small import OVERRIDES

from tokenfusion import UserError, api
from tokenfusion.backbones.pointnet2 import PointNet2
from tokenfusion.recipe import read_recipe

COLOUR = [
    "data.modalities=[points]",
    "data.colour=true",
    "model.points.channels=6",
    "train.steps=2",
    "train.batch_size=2",
]


def test_a_run_with_colours(rooms: Path, tmp_path: Path) -> None:
    recipe = read_recipe("toy-detection3d", [*OVERRIDES, *COLOUR, f"data.root={rooms}"])
    api.train(recipe, tmp_path / "run")
    first = next(
        p for name, p in api.load(tmp_path / "run").named_parameters() if "backbone.down.0" in name and p.dim() == 2
    )
    assert first.shape[1] == 6
    cloud = np.load(next((rooms / "points").glob("*.npy")))
    assert cloud.shape[1] == 6
    found = {}
    for name, rows in (
        ("as it is", cloud),
        ("grey", np.concatenate([cloud[:, :3], np.full_like(cloud[:, 3:], 0.5)], 1)),
    ):
        np.save(tmp_path / "cloud.npy", rows)
        api.predict(tmp_path / "run", tmp_path / name, {"points": tmp_path / "cloud.npy"})
        found[name] = json.loads((tmp_path / name / "cloud.json").read_text())["boxes"]
    assert found["as it is"] != found["grey"]
    np.save(tmp_path / "cloud.npy", cloud[:, :3])
    with pytest.raises(UserError, match=r"cloud.npy: has no colours, and they are asked for"):
        api.predict(tmp_path / "run", tmp_path / "none", {"points": tmp_path / "cloud.npy"})


def test_network_and_cloud_agree() -> None:
    for overrides in (["model.points.channels=6"], ["data.colour=true"]):
        with pytest.raises(UserError, match=r"model.points.channels is \d; with data.colour"):
            read_recipe("toy-detection3d", overrides)
    network = PointNet2(6, 0.25, (16, 8, 4, 2), (1.0, 1.0, 1.0, 1.0), (4, 4, 4, 4)).eval()
    assert network(torch.rand(1, 32, 6)).xyz.shape == (1, 8, 3)
    with pytest.raises(ValueError, match="the cloud has 3 channels, this network takes 6"):
        network(torch.rand(1, 32, 3))
