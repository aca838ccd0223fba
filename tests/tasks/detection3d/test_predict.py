"""Boxes for one's own files: every kind of cloud, with an image and without; and mistakes, each said in one line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tasks.detection3d.small import boxes_of, files_of, recipe, refused
from tasks.walk import plain_image

from tokenfusion import api
from tokenfusion.data.scenes import draw_rows
from tokenfusion.tasks.detection3d.metrics import Detections
from tokenfusion.tasks.detection3d.predict import drawable

CLASSES = ["picture", "cupboard", "panel", "cushion", "box", "sofa", "table", "dresser", "locker"]


def test_boxes_of_one_scene(run: Path, rooms: Path, tmp_path: Path) -> None:
    written = api.predict(run, tmp_path, files_of(rooms, "000006", "points", "rgb", "camera"))
    names = ["000006.json", "000006_above.png", "000006_boxes.png", "000006_scores.npz"]
    assert [path.name for path in written] == names
    found = boxes_of(written)
    assert 0 < len(found) <= 16
    scores = [box["score"] for box in found]
    assert scores == sorted(scores, reverse=True)
    for box in found:
        assert set(box) == {"class", "score", "center", "size", "yaw_rad", "objectness", "probabilities"}
        assert list(box["probabilities"]) == CLASSES
        assert sum(box["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert box["probabilities"][box["class"]] == max(box["probabilities"].values())
        assert box["score"] == pytest.approx(box["objectness"] * box["probabilities"][box["class"]])
        assert all(size >= 0 for size in box["size"])
        assert -np.pi <= box["yaw_rad"] <= np.pi
    columns, rows = Image.open(written[2]).size
    assert columns == 2 * rows, "the image's own shape"
    with np.load(written[3]) as arrays:
        assert set(arrays) == {"threshold", "seed", "layer0", "layer1"}
        assert arrays["threshold"] == np.float32(0.5)
        assert (arrays["seed"].shape, arrays["layer0"].shape) == ((32, 3), (32,))


def test_without_an_image_and_with_it(run: Path, rooms: Path, tmp_path: Path) -> None:
    alone = api.predict(run, tmp_path / "alone", files_of(rooms, "000006", "points"))
    assert [path.name for path in alone] == ["000006.json", "000006_above.png"]
    both = api.predict(run, tmp_path / "both", files_of(rooms, "000006", "points", "rgb", "camera"))
    assert boxes_of(alone) != boxes_of(both)
    (tmp_path / "none.json").write_text('{"views": []}')
    none = {**files_of(rooms, "000006", "points"), "camera": tmp_path / "none.json"}
    assert boxes_of(api.predict(run, tmp_path / "none", none)) == boxes_of(alone)


def cloud_files(rooms: Path, out: Path) -> dict[str, Path]:
    """The same points, in every format."""
    points = np.load(rooms / "points" / "000006.npy").astype("<f4")[:, :3]
    out.mkdir()
    files = {kind: out / f"cloud.{kind}" for kind in ("npy", "bin", "ply", "pcd")}
    np.save(files["npy"], points)
    files["bin"].write_bytes(np.concatenate([points, np.zeros_like(points)], 1).tobytes())
    fields = "".join(f"property float {axis}\n" for axis in "xyz")
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(points)}\n{fields}end_header\n"
    files["ply"].write_bytes(header.encode() + points.tobytes())
    header = f"VERSION 0.7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nWIDTH {len(points)}\nHEIGHT 1\n"
    header += f"VIEWPOINT 0 0 0 1 0 0 0\nPOINTS {len(points)}\nDATA binary\n"
    files["pcd"].write_bytes(header.encode() + points.tobytes())
    return files


def test_every_kind_of_cloud_gives_the_same_boxes(run: Path, rooms: Path, tmp_path: Path) -> None:
    found = {
        kind: boxes_of(api.predict(run, tmp_path / f"{kind}-out", {"points": path}))
        for kind, path in cloud_files(rooms, tmp_path / "clouds").items()
    }
    assert all(boxes == found["npy"] for boxes in found.values())


def test_few_points_are_enough(run: Path, tmp_path: Path) -> None:
    """Three points are drawn again and again, a single one is everywhere: boxes are finite all the same."""
    for count in (1, 3):
        np.save(tmp_path / "few.npy", np.float32([[0.0, 2.0, 0.5], [0.3, 2.2, 0.1], [-0.4, 3.0, 0.2]])[:count])
        found = boxes_of(api.predict(run, tmp_path / str(count), {"points": tmp_path / "few.npy"}))
        assert found
        assert np.isfinite([[*box["center"], *box["size"], box["score"]] for box in found]).all()


def test_views_of_a_file(run: Path, views: Path, rooms: Path, tmp_path: Path) -> None:
    """A camera file that lists views names its images itself, beside it."""
    beside = Path(shutil.copytree(views, tmp_path / "beside"))
    camera = beside / "views.json"
    shutil.copy(views / "camera" / "000006.json", camera)
    files = {**files_of(rooms, "000006", "points"), "camera": camera}
    listed = api.predict(run, tmp_path / "listed", files)
    assert [path.name for path in listed if "_boxes" in path.name] == ["000006_boxes.png"], "the run takes one view"
    one = api.predict(run, tmp_path / "one", files_of(rooms, "000006", "points", "rgb", "camera"))
    assert boxes_of(listed) == boxes_of(one)


def test_how_many_points_images_show_is_said(
    run: Path, rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = files_of(rooms, "000006", "points", "rgb", "camera")
    api.predict(run, tmp_path / "points", {"points": files["points"]})
    assert capsys.readouterr() == ("", ""), "there is no image"
    api.predict(run, tmp_path / "seen", files)
    said = capsys.readouterr()
    assert said.out == "", "there stand the written files"
    assert said.err == f"points that images show: {points_in_view(run, files)} of 256\n"
    inverse = json.loads(files["camera"].read_text())
    inverse["pose"] = np.linalg.inv(inverse["pose"]).tolist()
    (tmp_path / "inverse.json").write_text(json.dumps(inverse))
    api.predict(run, tmp_path / "blind", {**files, "camera": tmp_path / "inverse.json"})
    said = capsys.readouterr()
    count, warning = said.err.splitlines()
    assert count == "points that images show: 0 of 256"
    assert warning.startswith("warning: 000006: no image shows any point of the cloud; is the pose world to camera")


def points_in_view(run: Path, files: dict[str, Path]) -> int:
    """Counted from the file's own K and pose, on the image as it is."""
    cloud, camera = np.load(files["points"])[:, :3], json.loads(files["camera"].read_text())
    seed = yaml.safe_load((run / "recipe.yaml").read_text())["seed"]
    drawn = cloud[draw_rows(len(cloud), 256, torch.Generator().manual_seed(seed)).numpy()]
    world = np.linalg.inv(camera["pose"])
    u, v, depth = np.array(camera["K"]) @ (drawn @ world[:3, :3].T + world[:3, 3]).T
    columns, rows = Image.open(files["rgb"]).size
    inside = (np.abs(u / depth - columns / 2 + 0.5) < columns / 2) & (np.abs(v / depth - rows / 2 + 0.5) < rows / 2)
    return int((inside & (depth > 0)).sum())


def test_a_folder_names_the_scenes_that_no_image_shows(
    run: Path, broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for id in ("000007", "000008"):
        path = broken / f"camera/{id}.json"
        camera = json.loads(path.read_text())
        path.write_text(json.dumps({**camera, "pose": np.linalg.inv(camera["pose"]).tolist()}))
    api.predict(run, tmp_path / "out", data=broken, split="val")
    said = capsys.readouterr()
    assert " of 768\n" in said.err
    assert "warning: 000007 and 1 more: no image shows any point" in said.err


def test_an_infinite_box_is_left_out_of_pictures() -> None:
    rows = torch.tensor([[0.0, 2, 0, 1, 1, 1, 0], [3e38, 2, 0, 3e38, 1, 1, 0], [torch.nan, 2, 0, 1, 1, 1, 0]])
    found = Detections(rows, torch.ones(3), torch.tensor([[0.9, 0.1]] * 3))
    assert drawable(found, ["bed", "sofa"]).names == ["bed 0.90"]


def test_a_picture_shows_one_box_at_one_place() -> None:
    """Suppression is by class: a box and a cushion at one place are both written, and drawn over each other."""
    rows = torch.tensor([[0.0, 2, 0, 1, 1, 1, 0], [0.1, 2, 0, 1, 1, 1, 0], [3.0, 2, 0, 1, 1, 1, 0]])
    found = Detections(rows, torch.ones(3), torch.tensor([[0.6, 0.4], [0.2, 0.8], [0.7, 0.3]]))
    assert drawable(found, ["box", "cushion"]).names == ["cushion 0.80", "box 0.70"]


# ---- mistakes ------------------------------------------------------------------------------------------------------


def mistakes(rooms: Path, folder: Path) -> dict[str, tuple[list[object], str]]:
    """Arguments of predict, and what the message must say."""
    cloud, rgb, camera = (rooms / f"{kind}/000006.{end}" for kind, end in
                          (("points", "npy"), ("rgb", "png"), ("camera", "json")))  # fmt: skip
    (folder / "cut.npy").write_bytes(cloud.read_bytes()[:500])
    (folder / "cut.ply").write_bytes(b"ply\nformat binary_little_endian 1.0\nelement vertex 9\n")
    (folder / "noise.pcd").write_bytes(os.urandom(300))
    (folder / "odd.bin").write_bytes(b"1234567")
    (folder / "cut.png").write_bytes(rgb.read_bytes()[:60])
    for name, values in {
        "empty": np.zeros((0, 3), np.float32),
        "nan": np.full((50, 3), np.nan, np.float32),
        "flat": np.zeros((50, 2), np.float32),
        "far": np.full((50, 3), 1e30, np.float32),
    }.items():
        np.save(folder / f"{name}.npy", values)

    def spoilt(name: str, **changes: Any) -> Path:
        content = {**json.loads(camera.read_text()), **changes}
        (folder / f"{name}.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
        return folder / f"{name}.json"

    eye = np.eye(4)
    good = [f"points={cloud}", f"rgb={rgb}"]
    return {
        "no cloud": ([f"rgb={rgb}", f"camera={camera}"], "points=FILE is missing"),
        "missing cloud": (["points=none.npy"], "none.npy: no such file"),
        "cloud cut short": ([f"points={folder / 'cut.npy'}"], "cut.npy: cannot be read as a point cloud"),
        "ply cut short": ([f"points={folder / 'cut.ply'}"], "cut.ply: cannot be read as a point cloud"),
        "noise": ([f"points={folder / 'noise.pcd'}"], "noise.pcd: cannot be read as a point cloud"),
        "odd rows": ([f"points={folder / 'odd.bin'}"], "odd.bin: 7 bytes are no rows of 6 float32"),
        "empty cloud": ([f"points={folder / 'empty.npy'}"], "empty.npy: holds no points"),
        "cloud of NaN": ([f"points={folder / 'nan.npy'}"], "nan.npy: its 50 points are NaN or infinite"),
        "two columns": ([f"points={folder / 'flat.npy'}"], "wanted [points, 3] or [points, 6]"),
        "a picture for a cloud": ([f"points={rgb}"], ".png is no kind of point cloud"),
        "image without camera": (good, "without camera=FILE nobody knows where the image shows a point"),
        "camera without image": ([good[0], f"camera={camera}"], "give rgb=FILE, or list views in it"),
        "missing camera": ([*good, "camera=none.json"], "none.json: no such file"),
        "camera that is no JSON": ([*good, f"camera={rgb}"], "000006.png"),
        "singular K": ([*good, f"camera={spoilt('k', K=[[0] * 3] * 3)}"], "k.json: K: wanted focal lengths"),
        "no K": ([*good, f"camera={spoilt('no-k', K=None)}"], "no-k.json: the key 'K' is missing"),
        "a pose that shears": ([*good, f"camera={spoilt('p', pose=(eye * 2).tolist())}"], "p.json: pose: is no rotation"),
        "image cut short": ([good[0], f"rgb={folder / 'cut.png'}", f"camera={camera}"], "cut.png"),
        "one channel": ([good[0], f"rgb={plain_image(folder / 'gray.png', (32, 64))}", f"camera={camera}"], "gray.png"),
        "view that is not there": (
            [good[0], f"camera={spoilt('v', views=[{'image': 'x.jpg', **json.loads(camera.read_text())}])}"], "x.jpg"),
        "image beside views": (
            [*good, f"camera={spoilt('vi', views=[{'image': 'x.jpg', **json.loads(camera.read_text())}])}"],
            f"vi.json: lists views, which name their images; leave rgb={rgb} out"),
        "image beside no views": ([*good, f"camera={spoilt('none', views=[])}"], "none.json: lists views"),
        "focal lengths out of reach": (
            [*good, f"camera={spoilt('f', K=[[1e150, 0, 0], [0, 1e150, 0], [0, 0, 1]])}"], "f.json: K: holds 1e+150"),
        "cloud out of reach": ([f"points={folder / 'far.npy'}"], "far.npy: a coordinate is 1e+30; wanted metres"),
        "a file without a name": ([cloud], "wanted name=file, for example points=a.npy rgb=a.jpg camera=a.json"),
        "unknown input": ([good[0], f"image={rgb}"], "image=...: this run takes no such input; known: camera, points, rgb"),
        "another split": ([*good, "--split", "val"], "--split belongs to --data"),
        "nothing": ([], "predict wants either files (points=a.npy rgb=a.jpg camera=a.json) or --data FOLDER"),
    }  # fmt: skip


CASES = [
    "no cloud",
    "missing cloud",
    "cloud cut short",
    "ply cut short",
    "noise",
    "odd rows",
    "empty cloud",
    "cloud of NaN",
    "two columns",
    "a picture for a cloud",
    "image without camera",
    "camera without image",
    "missing camera",
    "camera that is no JSON",
    "singular K",
    "no K",
    "a pose that shears",
    "image cut short",
    "one channel",
    "view that is not there",
    "image beside views",
    "image beside no views",
    "focal lengths out of reach",
    "cloud out of reach",
    "a file without a name",
    "unknown input",
    "another split",
    "nothing",
]


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_one_line(
    case: str, run: Path, rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, said = mistakes(rooms, tmp_path)[case]
    message = refused(capsys, "predict", run, *arguments, "--out", tmp_path / "out")
    assert said in message
    assert not (tmp_path / "out").exists()


def test_no_mistake_is_forgotten(rooms: Path, tmp_path: Path) -> None:
    assert list(mistakes(rooms, tmp_path)) == CASES


def test_an_image_for_a_run_of_points(rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It would be ignored, and its user think that it was not."""
    api.train(recipe(rooms, "data.modalities=[points]", "train.steps=1"), tmp_path / "run")
    cloud = f"points={rooms / 'points' / '000006.npy'}"
    for name, file in (("rgb", "rgb/000006.png"), ("camera", "camera/000006.json")):
        arguments = ["predict", tmp_path / "run", cloud, f"{name}={rooms / file}", "--out", tmp_path / "out"]
        assert f"{name}=...: this run takes no such input" in refused(capsys, *arguments)
    assert not (tmp_path / "out").exists()


def test_predict_spares_its_inputs_and_writes_all_or_nothing(
    run: Path, broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in broken.rglob("*") if path.is_file()}
    arguments = ["predict", run, "--data", broken, "--split", "val"]
    for folder in ("boxes", "camera"):  # a file ID.json each, as predict writes
        assert "is one of the inputs; choose another --out" in refused(capsys, *arguments, "--out", broken / folder)
    beside = tmp_path / "beside"
    beside.mkdir()
    shutil.copy(broken / "camera" / "000006.json", beside / "000006.json")
    files = [f"points={broken / 'points' / '000006.npy'}", f"rgb={broken / 'rgb' / '000006.png'}"]
    message = refused(capsys, "predict", run, *files, f"camera={beside / '000006.json'}", "--out", beside)
    assert "000006.json: is one of the inputs" in message
    assert [path.name for path in beside.iterdir()] == ["000006.json"]
    assert {path: path.read_bytes() for path in broken.rglob("*") if path.is_file()} == before
    second = broken / "points" / "000007.npy"
    second.write_bytes(second.read_bytes()[:80])
    assert second.name in refused(capsys, *arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
