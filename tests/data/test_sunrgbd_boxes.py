"""SUN RGB-D's scenes: MATLAB's structures in all their shapes, the exact pixel formula, and a real frame."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tokenfusion.data.folder import Folder
from tokenfusion.data.prepare import sunrgbd, sunrgbd_boxes
from tokenfusion.data.prepare.archive import read_mat
from tokenfusion.data.prepare.sunrgbd import Expected
from tokenfusion.data.prepare.sunrgbd_boxes import camera_of, prepare, unproject
from tokenfusion.data.scene import projection_of
from tokenfusion.data.scenes import Scenes, collate_scenes
from tokenfusion.errors import UserError

scipy_io = pytest.importorskip("scipy.io")

FEW = Expected(frames=4, train=3, val=1)
PREFIX = "/n/fs/sun3d/data/SUNRGBD/"
FRAMES = {"kv1/a": (24, 32), "kv2/b": (20, 28), "realsense/c": (16, 18), "xtion/d": (24, 32)}
TILT = np.array([[1, 0, 0], [0, math.cos(0.2), -math.sin(0.2)], [0, math.sin(0.2), math.cos(0.2)]])


def thing(name: str, **changes: Any) -> dict[str, Any]:
    """As the table writes an object: half sizes that may be negative, in the order w l h, and more than is asked for."""
    centroid, coeffs = np.array([[0.5, 2.0, -0.3]]), np.array([[0.4, -0.9, 0.25]])
    whole = {"basis": np.eye(3), "coeffs": coeffs, "centroid": centroid, "classname": name, "labelname": "x"}
    return {**whole, "orientation": np.array([[0.6, 0.8, 0.0]]), **changes}


def rectangle(name: str, box: list[float]) -> dict[str, Any]:
    return {"objid": 1.0, "classname": name, "gtBb2D": np.array([box])}


def structs(rows: list[dict[str, Any]]) -> np.ndarray:
    """None, one or several as MATLAB keeps them: [0, 0], a structure, or an array of structures."""
    if not rows:
        return np.zeros((0, 0))
    array = np.zeros((1, len(rows)), dtype=[(name, object) for name in rows[0]])
    for column, row in enumerate(rows):
        for name, value in row.items():
            array[0, column][name] = value
    return array


OBJECTS = [
    [thing("bed")],  # one
    [],  # none
    [thing("night_stand"), thing("lamp"), thing("chair", coeffs=np.array([[0.3, 0.2, 0.0]])), thing("chair")],
    [thing("sofa"), thing("desk"), thing("table")],
]
RECTANGLES = [
    [rectangle("bed", [3, 4, 10, 12])],
    [rectangle("lamp", [1, 1, 5, 5])],
    [rectangle(name, [k, 2, 6, 7]) for k, name in enumerate(("night_stand", "lamp", "chair", "chair"))],
    [rectangle("sofa", [2, 2, 9, 9]), rectangle("chair", [1, 1, 4, 4])],  # from the second on they disagree
]


def camera_matrix(size: tuple[int, int]) -> np.ndarray:
    """Every sensor has its own, with pixels that count from 1."""
    return np.array([[2.0 * size[1], 0, size[1] / 2 + 1], [0, 2.0 * size[1], size[0] / 2 + 1.5], [0, 0, 1]])


def write_tables(toolbox: Path, name: str = sunrgbd.META, **changes: Any) -> None:
    (toolbox / "Metadata").mkdir(parents=True, exist_ok=True)
    rows = []
    for index, (folder, size) in enumerate(FRAMES.items()):
        row = {
            "sequenceName": folder,
            "groundtruth3DBB": structs(OBJECTS[index]),
            "K": camera_matrix(size),
            "Rtilt": TILT,
        }
        row |= {"rgbpath": f"{PREFIX}{folder}/image/im.jpg", "depthname": "d.png"}
        row |= {"groundtruth2DBB": structs(RECTANGLES[index])}
        rows.append({**row, **(changes if index == 2 else {})})
    scipy_io.savemat(toolbox / "Metadata" / name, {"SUNRGBDMeta": structs(rows)})
    folders = [f"{PREFIX}{folder}" for folder in FRAMES]
    lists = {"alltrain": np.array([folders[:3]], dtype=object), "alltest": np.array([[folders[3]]], dtype=object)}
    scipy_io.savemat(toolbox / sunrgbd.SPLITS, lists)


def depth_of(size: tuple[int, int]) -> np.ndarray:
    """Millimetres with holes, and beyond what counts."""
    depth = 1000 + 37 * np.arange(size[0] * size[1], dtype=np.int64).reshape(size) % 6000
    depth[::5, ::3], depth[1, 1] = 0, 9000
    return depth.astype(np.uint16)


ANSWERS: dict[tuple[object, ...], dict[str, Any]] = {}


@pytest.fixture(autouse=True)
def each_table_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child process behind read_mat takes half a second."""

    def read(path: Path, names: list[str], fields: tuple[str, ...] = ()) -> dict[str, Any]:
        key = (path.read_bytes()[116:], *names, *fields)  # before stands the time of writing
        if key not in ANSWERS:
            ANSWERS[key] = read_mat(path, names, fields)
        return ANSWERS[key]

    monkeypatch.setattr(sunrgbd, "read_mat", read)
    monkeypatch.setattr(sunrgbd_boxes, "read_mat", read)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    official = tmp_path / "official"
    rng = np.random.default_rng(0)
    for folder, size in FRAMES.items():
        frame = official / "SUNRGBD" / folder
        for part in ("image", "depth", "depth_bfx"):
            (frame / part).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(frame / "image/im.jpg")
        depth = depth_of(size)
        for part, holes in (("depth", depth), ("depth_bfx", np.maximum(depth, 500))):
            Image.fromarray((holes << np.uint16(3)) | (holes >> np.uint16(13))).save(frame / part / "d.png")
    write_tables(official / "SUNRGBDtoolbox")
    return official


def boxes_of(out: Path, name: str) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = json.loads((out / f"boxes/{name}.json").read_text())["boxes"]
    return content


def test_every_frame_is_written_with_its_objects_and_camera(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "sun"
    counts = prepare(source, out, progress=False, expected=FEW)
    wanted = {"frames": 4, "train": 3, "val": 1, "classes": 10, "boxes": 6, "frames without boxes": 1, "left out": 0}
    wanted |= {"boxes without extent, left out": 1, "boxes without box2d": 2}
    wanted |= {"boxes that the official export to text drops": 2}
    assert {key: counts[key] for key in wanted} == wanted
    folder = Folder(out)
    assert folder.scene.classes == tuple(sunrgbd_boxes.CLASSES)
    assert (folder.ids("train"), folder.ids("val")) == (["000001", "000002", "000003"], ["000004"])
    assert folder.verify() == 4 * 4 + 5
    assert [len(folder.read_boxes(f"{n:06d}").names) for n in (1, 2, 3, 4)] == [1, 0, 2, 3]
    assert [box["class"] for box in boxes_of(out, "000003")] == ["night_stand", "chair"]
    assert [box.get("box2d") for box in boxes_of(out, "000003")] == [[0, 2, 6, 9], [3, 2, 9, 9]]
    assert ["box2d" in box for box in boxes_of(out, "000004")] == [True, False, False]
    (bed,) = boxes_of(out, "000001")
    assert bed["box2d"] == [3, 4, 13, 16]
    assert bed["center"] == [0.5, 2.0, -0.3]
    assert bed["size"] == pytest.approx([1.8, 0.8, 0.5])  # l w h from the half sizes w l h
    assert bed["yaw_rad"] == pytest.approx(math.atan2(0.8, 0.6))
    assert (out / "frames.txt").read_text().splitlines()[2] == "000003 realsense/c"
    about = json.loads((out / "source.json").read_text())
    assert about["boxes"] == "v1"
    assert about["counts"]["boxes without box2d"] == 2
    assert f"sha256 {sunrgbd.META}" in about


@pytest.mark.parametrize("depth", ["filled", "raw"])
def test_points_fall_on_their_pixels_and_have_their_colours(source: Path, tmp_path: Path, depth: str) -> None:
    prepare(source, tmp_path / "sun", depth=depth, progress=False, expected=FEW)  # type: ignore[arg-type]
    folder = Folder(tmp_path / "sun")
    for number, size in enumerate(FRAMES.values(), 1):
        name = f"{number:06d}"
        (view,) = folder.read_views(name)
        points = folder.read_cloud(name).points.double()
        cam = points[:, :3] @ projection_of(view.K, view.pose)[:, :3].T
        pixel = cam[:, :2] / cam[:, 2:]
        assert (pixel - pixel.round()).abs().max() < 1e-4
        column, row = pixel.round().long().T
        rgb = folder.read(name, ["rgb"])["rgb"]
        torch.testing.assert_close(points[:, 3:].T, rgb[:, row, column].double() / 255, atol=1e-6, rtol=0)
        stored = torch.from_numpy(depth_of(size).astype(np.int64)).clamp(max=8000)
        stored = stored.clamp(min=500) if depth == "filled" else stored
        torch.testing.assert_close(cam[:, 2], stored[row, column].double() / 1000, atol=1e-5, rtol=0)
        assert len(points) == int((stored > 0).sum())


def test_scenes_of_all_sensors_make_a_batch(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "sun", progress=False, expected=FEW)
    scenes = Scenes(Folder(tmp_path / "sun"), "train", ("points", "rgb"), 100, image_size=(24, 32))
    batch = collate_scenes([scenes[index] for index in range(3)])
    assert batch.truth is not None
    assert batch.truth.mask.sum(1).tolist() == [1, 0, 2]
    assert batch.truth.mask2d.sum((1, 2)).tolist() == [1, 0, 2]


def test_points_are_drawn_by_the_seed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sunrgbd_boxes, "POINTS", 50)
    clouds = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare(source, tmp_path / name, seed=seed, progress=False, expected=FEW)
        clouds.append(Folder(tmp_path / name).read_cloud("000001").points)
    assert clouds[0].shape == (50, 6)
    assert len(clouds[0].unique(dim=0)) == 50
    assert torch.equal(clouds[0], clouds[1])
    assert not torch.equal(clouds[0], clouds[2])


def test_version_two_takes_its_rectangles_from_a_table_of_their_own(source: Path, tmp_path: Path) -> None:
    metadata = source / "SUNRGBDtoolbox/Metadata"
    with pytest.raises(UserError, match=r"holds no SUNRGBDMeta3DBB_v2\.mat"):
        prepare(source, tmp_path / "sun", boxes="v2", progress=False, expected=FEW)
    write_tables(source / "SUNRGBDtoolbox", "SUNRGBDMeta3DBB_v2.mat", groundtruth3DBB=structs([thing("bathtub")]))
    rows = [{"sequenceName": "x", "groundtruth2DBB": structs(rows)} for rows in RECTANGLES]
    rows[2]["groundtruth2DBB"] = structs([{**rectangle("bathtub", [1, 2, 3, 4]), "has3dbox": 1.0}])
    scipy_io.savemat(metadata / "SUNRGBDMeta2DBB_v2.mat", {"SUNRGBDMeta2DBB": structs(rows)})
    prepare(source, tmp_path / "sun", boxes="v2", progress=False, expected=FEW)
    (tub,) = boxes_of(tmp_path / "sun", "000003")
    assert (tub["class"], tub["box2d"]) == ("bathtub", [1, 2, 4, 6])
    scipy_io.savemat(metadata / "SUNRGBDMeta2DBB_v2.mat", {"SUNRGBDMeta2DBB": structs(rows[:3])})
    with pytest.raises(UserError, match=r"2DBB_v2\.mat: describes 3 frames, wanted 4"):
        prepare(source, tmp_path / "other", boxes="v2", progress=False, expected=FEW)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"K": np.eye(2)}, "frame 3 has no K of"),
        ({"K": np.zeros((3, 3))}, "frame 3: K is no camera matrix"),
        ({"K": np.array([[50, 0, 8], [0, 50, 9], [0, 1, 1.0]])}, "frame 3: K is no camera matrix"),
        ({"Rtilt": 2 * TILT}, "frame 3: .*Rtilt no rotation"),
        ({"Rtilt": -TILT}, "frame 3: .*Rtilt no rotation"),  # a mirror
        ({"groundtruth3DBB": structs([thing("bed", centroid=np.array([1.0, 2.0]))])}, "frame 3 has no centroid"),
        ({"groundtruth3DBB": structs([thing("bed", coeffs="wide")])}, "frame 3 has no centroid, coeffs"),
    ],
)
def test_wrong_frames_stop_the_preparation_or_are_left_out(
    source: Path, tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    write_tables(source / "SUNRGBDtoolbox", **changes)
    with pytest.raises(UserError, match=text) as caught:
        prepare(source, tmp_path / "sun", progress=False, expected=FEW)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "sun").exists()
    counts = prepare(source, tmp_path / "sun", on_bad="skip", progress=False, expected=FEW)
    assert (counts["frames"], counts["train"], counts["left out"], counts["boxes"]) == (3, 2, 1, 4)
    assert Folder(tmp_path / "sun").ids("train") == ["000001", "000002"]
    assert list(json.loads((tmp_path / "sun/source.json").read_text())["left out"]) == ["000003"]


def test_missing_and_damaged_files_are_named(source: Path, tmp_path: Path) -> None:
    def refuse(text: str, **options: Any) -> None:
        with pytest.raises(UserError, match=text) as caught:
            prepare(source, tmp_path / "sun", **{"progress": False, "expected": FEW, **options})
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "sun").exists()

    refuse("--boxes is 'v3'; choose v1 or v2", boxes="v3")
    refuse("--depth is 'none'", depth="none")
    refuse("--on-bad is 'ask'", on_bad="ask")
    refuse(r"SUNRGBDMeta\.mat: describes 4 frames, wanted 10335", expected=Expected())
    frame = source / "SUNRGBD/kv2/b"
    jpg = frame / "image/im.jpg"
    whole = jpg.read_bytes()
    jpg.write_bytes(whole[:200])
    refuse(r"im\.jpg: cannot be read as an image")
    jpg.write_bytes(whole)
    Image.fromarray(np.zeros((20, 28), np.uint16)).save(frame / "depth_bfx/d.png")
    refuse(r"kv2.b: holds no depth at all")
    Image.fromarray(np.ones((20, 20), np.uint16)).save(frame / "depth_bfx/d.png")
    refuse(r"image is \(20, 28\) but depth \(20, 20\)")
    for folder in FRAMES:
        (source / "SUNRGBD" / folder / "depth_bfx/d.png").unlink()
    refuse(r"no such file.*; so it is with all 4 frames", on_bad="skip")
    (source / "SUNRGBDtoolbox/Metadata" / sunrgbd.META).write_bytes(b"MATLAB 5.0")
    refuse(r"SUNRGBDMeta\.mat: cannot be read as a MATLAB 5 file")


@pytest.mark.skipif("TOKENFUSION_DATA" not in os.environ, reason="real recordings: TOKENFUSION_DATA is not set")
def test_the_formula_holds_on_a_real_frame(real_data: Path) -> None:
    place = real_data / "detection3d/sunrgbd_000017"
    points = np.fromfile(place / "000017.bin", "<f4").reshape(-1, 6)
    lines = (place / "calib_000017.txt").read_text().splitlines()
    tilt, K = (np.array(line.split(), float).reshape(3, 3).T for line in lines[:2])  # column by column
    camera = camera_of(K, tilt)
    with Image.open(place / "000017.jpg") as image:
        pixels = np.asarray(image)
    P = projection_of(torch.from_numpy(camera.K), torch.from_numpy(camera.pose)).numpy()
    cam = points[:, :3].astype(np.float64) @ P[:, :3].T + P[:, 3]
    pixel = cam[:, :2] / cam[:, 2:]
    assert np.abs(pixel - pixel.round()).max() < 1e-3
    column, row = pixel.round().astype(int).T
    np.testing.assert_allclose(points[:, 3:], pixels[row, column] / 255, atol=1e-6)  # all 50,000 of them
    shifted = pixels[(row + 1).clip(max=529), (column + 1).clip(max=729)] / 255  # K left as it counts, from 1
    assert (np.abs(points[:, 3:] - shifted).max(1) < 1e-6).mean() < 0.5

    depth_mm = np.rint(cam[:, 2] * 1000)
    assert np.abs(cam[:, 2] * 1000 - depth_mm).max() < 2e-3  # as a depth png stores it
    depth_m = np.zeros(pixels.shape[:2])
    depth_m[row, column] = depth_mm / 1000
    again = unproject(depth_m, pixels, camera)
    np.testing.assert_allclose(again, points[np.lexsort((column, row))], atol=1e-5)  # row by row
