"""Real scenes go the whole way: reading, projection, boxes, training, prediction, pictures."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from tasks.detection3d.small import OVERRIDES

from tokenfusion import api
from tokenfusion.data.boxes import contains
from tokenfusion.data.folder import Folder
from tokenfusion.data.scenes import Scenes
from tokenfusion.fusion.projection import project
from tokenfusion.recipe import read_recipe
from tokenfusion.report import write_report


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).parents[3] / "examples" / "mmdet3d_scene.py"
    spec = importlib.util.spec_from_file_location("mmdet3d_scene", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def frame(example: ModuleType, real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SUN RGB-D frame as a folder."""
    source, out = real_data / "detection3d" / "sunrgbd_000017", tmp_path_factory.mktemp("real") / "frame"
    info = json.loads((source / "sunrgbd_000017_infos.json").read_text())
    example.write(info, source / "000017.bin", source / "000017.jpg", out)
    return out


@pytest.fixture(scope="module")
def scan(example: ModuleType, real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ScanNet scan as a folder."""
    source, out = real_data / "detection3d" / "scannet", tmp_path_factory.mktemp("real") / "scan"
    info = json.loads((source / "mmdet3d_scannet_infos.json").read_text())
    example.write(info, source / "mmdet3d_scene0000_00_points.bin", None, out)
    return out


def test_points_of_the_frame_have_the_colours_of_their_pixels(frame: Path) -> None:
    scene = Scenes(Folder(frame), "val", ("points", "rgb"), 50000, image_size=(530, 730), colour=True)[0]
    assert scene.projection is not None
    pixels, depth = project(scene.points[:, :3], scene.projection[0])
    assert (depth > 0).all()
    image = np.asarray(Image.open(frame / "rgb" / "000017.jpg"))
    column, row = pixels.round().long().T.numpy()
    stored = (scene.points[:, 3:] * 255).round().numpy()
    assert (np.abs(image[row, column] - stored).max(1) <= 1).mean() > 0.999  # K and R come out of their rounded product


def test_points_lie_in_the_boxes(frame: Path, scan: Path) -> None:
    counts = {}
    for folder in (frame, scan):
        cloud, boxes = Folder(folder).read_cloud(_id(folder)), Folder(folder).read_boxes(_id(folder))
        counts[folder.name] = contains(cloud.points[:, :3], boxes.boxes).sum(0).tolist()
    assert counts["frame"][1] == pytest.approx(18117, abs=60)  # the bed
    assert len(counts["scan"]) == 27
    assert min(counts["scan"]) > 20


def _id(folder: Path) -> str:
    return Folder(folder).ids("val")[0]


@pytest.mark.parametrize("kind", ["frame", "scan"])
def test_a_scene_trains_predicts_and_is_shown(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder: Path = request.getfixturevalue(kind)
    images = [] if kind == "frame" else ["data.modalities=[points]", "fuser=none"]
    recipe = read_recipe(
        "toy-detection3d", [*OVERRIDES, *images, f"data.root={folder}", "train.steps=2", "train.batch_size=1"]
    )
    api.train(recipe, tmp_path / "run")
    name = _id(folder)
    files = {"points": folder / "points" / f"{name}.npy"}
    if kind == "frame":
        files |= {"rgb": folder / "rgb" / f"{name}.jpg", "camera": folder / "camera" / f"{name}.json"}
    written = api.predict(tmp_path / "run", tmp_path / "out", files)
    ends = ["_above.png", "_boxes.png", "_scores.npz", ".json"] if kind == "frame" else ["_above.png", ".json"]
    assert sorted(path.name for path in written) == sorted(f"{name}{end}" for end in ends)
    found = json.loads((tmp_path / "out" / f"{name}.json").read_text())["boxes"]
    assert found
    assert all(np.isfinite([*box["center"], *box["size"], box["yaw_rad"], box["score"]]).all() for box in found)
    assert write_report(tmp_path / "run").stat().st_size > 50_000


@pytest.mark.slow
def test_the_boxes_of_the_frame_are_learned(frame: Path, tmp_path: Path) -> None:
    """One scene over and over: the last head, and all together, find every box with an IoU above one half."""
    still = ["data.flip_x=0", "data.rotation_deg=0", "data.scale=[1, 1]", "train.batch_size=1", "train.eval_every=0"]
    finer = ["data.points=12000", "model.points.points=[1024, 512, 256, 128]", "model.points.proposals=96"]
    longer = ["data.image=[272, 368]", "model.points.momentum=0.5", "train.steps=800"]
    recipe = read_recipe("toy-detection3d", [f"data.root={frame}", *still, *finer, *longer])
    api.train(recipe, tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["streams"]["all_layers"]["map50"] == metrics["streams"]["last"]["map50"] == 100
    files = {"points": next((frame / "points").iterdir()), "rgb": frame / "rgb" / "000017.jpg"}
    files["camera"] = frame / "camera" / "000017.json"
    written = api.predict(tmp_path / "run", tmp_path / "found", files)
    boxes = json.loads(next(path for path in written if path.suffix == ".json").read_text())["boxes"]
    assert {box["class"] for box in boxes[:2]} == {"bed", "night_stand"}
