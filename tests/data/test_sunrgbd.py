"""SUN RGB-D from small archives in the official layout: folders per frame, MATLAB 5 structs, HDF5 references."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tokenfusion.data.folder import Folder
from tokenfusion.data.prepare import sunrgbd
from tokenfusion.data.prepare.archive import read_mat
from tokenfusion.data.prepare.sunrgbd import CLASSES, Expected, prepare, undo_shift
from tokenfusion.errors import UserError

h5py = pytest.importorskip("h5py")
scipy_io = pytest.importorskip("scipy.io")

FEW = Expected(frames=3, train=2, val=1)
PREFIX = "/n/fs/sun3d/data/SUNRGBD/"
FRAMES = {"kv1/NYUdata/NYU0001": (12, 16), "kv2/data/a-resize": (10, 14), "xtion/sun3ddata/b/c": (8, 9)}
DEPTH_MM = np.array([0, 500, 7999, 9000, 65535], dtype=np.uint16)


def shift(depth_mm: np.ndarray) -> np.ndarray:
    return (depth_mm << np.uint16(3)) | (depth_mm >> np.uint16(13))


def label_of(size: tuple[int, int]) -> np.ndarray:
    return (np.arange(size[0] * size[1]).reshape(size) % 38).astype(np.uint8)


def write_tables(toolbox: Path, labels: list[np.ndarray], fields: tuple[str, ...] = ("rgbpath", "depthname")) -> None:
    (toolbox / "Metadata").mkdir(parents=True, exist_ok=True)
    (toolbox / "traintestSUNRGBD").mkdir(exist_ok=True)
    rows = np.zeros((1, len(FRAMES)), dtype=[(field, object) for field in (*fields, "groundtruth3DBB")])
    for index, folder in enumerate(FRAMES):
        values = {"rgbpath": f"{PREFIX}{folder}/image/im{index}.jpg", "depthname": f"d{index}.png"}
        for field in fields:
            rows[0, index][field] = values[field]
        rows[0, index]["groundtruth3DBB"] = np.zeros((0, 0))
    scipy_io.savemat(toolbox / "Metadata" / sunrgbd.META, {"SUNRGBDMeta": rows})
    folders = [f"{PREFIX}{folder}" for folder in FRAMES]
    lists = {"alltrain": np.array([[folders[0], folders[2]]], dtype=object), "alltest": np.empty((1, 1), dtype=object)}
    lists["alltest"][0, 0] = folders[1] + "/"
    scipy_io.savemat(toolbox / "traintestSUNRGBD" / sunrgbd.SPLITS, lists)
    write_labels(toolbox, labels)


def write_labels(toolbox: Path, labels: list[np.ndarray]) -> None:
    with h5py.File(toolbox / "Metadata" / sunrgbd.LABELS, "w") as file:
        references = file.create_dataset("SUNRGBD2Dseg/seglabel", (len(labels), 1), dtype=h5py.ref_dtype)
        for index, label in enumerate(labels):
            references[index, 0] = file.create_dataset(f"#refs#/{index}", data=label.T).ref


@pytest.fixture(autouse=True)
def each_table_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child process behind read_mat takes half a second: tests that refuse ten times keep its answers."""
    answers: dict[tuple[object, ...], dict[str, Any]] = {}

    def read(path: Path, names: list[str], fields: tuple[str, ...] = ()) -> dict[str, Any]:
        key = (path, path.read_bytes(), *names)
        if key not in answers:
            answers[key] = read_mat(path, names, fields)
        return answers[key]

    monkeypatch.setattr(sunrgbd, "read_mat", read)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    official = tmp_path / "official"
    rng = np.random.default_rng(0)
    for index, (folder, (height, width)) in enumerate(FRAMES.items()):
        frame = official / "SUNRGBD" / folder
        for part in ("image", "depth", "depth_bfx"):
            (frame / part).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(frame / f"image/im{index}.jpg")
        depth_mm = DEPTH_MM[np.arange(height * width).reshape(height, width) % 5]
        Image.fromarray(shift(depth_mm)).save(frame / f"depth/d{index}.png")
        Image.fromarray(shift(np.maximum(depth_mm, 1))).save(frame / f"depth_bfx/other{index}.png")
    write_tables(official / "SUNRGBDtoolbox", [label_of(size) for size in FRAMES.values()])
    return official


def refuse(source: Path, out: Path, text: str, expected: Expected = FEW) -> None:
    with pytest.raises(UserError, match=text) as caught:
        prepare(source, out, progress=False, expected=expected)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    assert not list(out.parent.glob(".*partial*"))


def test_bits_are_rotated_back() -> None:
    every = np.arange(65536, dtype=np.uint16)
    assert np.array_equal(undo_shift(shift(every)), every)
    assert undo_shift(np.array([8 * 1234], np.uint16))[0] == 1234


def test_every_frame_keeps_its_size_bytes_and_labels(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "sun"
    summary = prepare(source, out, depth="raw", progress=False, expected=FEW)
    assert [summary[key] for key in ("frames", "train", "val", "classes")] == [3, 2, 1, 37]
    assert summary["frames without any depth"] == 0
    folder = Folder(out)
    assert folder.ids("train") == ["000001", "000003"]
    assert folder.ids("val") == ["000002"]
    assert folder.classes == CLASSES
    assert folder.verify() == 3 * 3 + 5
    for index, (name, size) in enumerate(FRAMES.items()):
        id = f"{index + 1:06d}"
        assert (
            folder.image_path(id, "rgb").read_bytes() == next((source / "SUNRGBD" / name).glob("image/*")).read_bytes()
        )
        label = label_of(size).astype(int)
        assert np.array_equal(folder.read_target(id).numpy(), np.where(label == 0, 255, label - 1))
        depth = folder.read(id, ["depth"])["depth"][0].numpy()
        wanted = np.array([0.0, 0.5, 7.999, 8.0, 8.0], np.float32)[np.arange(depth.size) % 5]
        assert np.allclose(depth.ravel(), wanted)
    assert (out / "frames.txt").read_text().splitlines()[1] == "000002 kv2/data/a-resize"


def test_filled_depth_comes_from_depth_bfx(source: Path, tmp_path: Path) -> None:
    summary = prepare(source, tmp_path / "sun", progress=False, expected=FEW)
    assert summary["missing depth pixels"] == 0


@pytest.mark.parametrize("place", ["", "SUNRGBD/SUNRGBD", "downloads/x"])
def test_frames_are_found_however_deep_they_were_unpacked(source: Path, tmp_path: Path, place: str) -> None:
    (source / "SUNRGBD").rename(source / "moved")
    (source / place).mkdir(parents=True, exist_ok=True)
    for sensor in ("kv1", "kv2", "xtion"):
        (source / "moved" / sensor).rename(source / place / sensor)
    assert prepare(source, tmp_path / "sun", progress=False, expected=FEW)["frames"] == 3


def test_missing_frames_say_what_was_found(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (source / "SUNRGBD/kv2/data/a-resize").rename(source / "SUNRGBD/kv2/data/b-resize")
    refuse(source, out, r"2 of 3 frame folders found below .*SUNRGBD; the first that is missing is kv2/data/a-resize")
    (source / "SUNRGBD").rename(tmp_path / "away")
    refuse(source, out, "holds none of the folders kv1, kv2, realsense, xtion")


def test_wrong_tables_are_refused_by_name(source: Path, tmp_path: Path) -> None:
    out, toolbox = tmp_path / "out", source / "SUNRGBDtoolbox"
    labels = [label_of(size) for size in FRAMES.values()]
    refuse(source, out, r"SUNRGBDMeta\.mat: describes 3 frames, wanted 10335", Expected())
    refuse(source, out, r"allsplit\.mat: lists 2 train frames, wanted 1", Expected(3, 1, 2))
    write_labels(toolbox, labels[:2])
    refuse(source, out, r"SUNRGBD2Dseg\.mat: has 2 label images, wanted 3")
    write_labels(toolbox, [*labels[:2], labels[2][:, :5]])
    refuse(source, out, r"SUNRGBD2Dseg\.mat: label 3 is \(8, 5\), but .*xtion.* has \(8, 9\)")
    write_labels(toolbox, [labels[0], labels[1] + 1, labels[2]])
    refuse(source, out, r"SUNRGBD2Dseg\.mat: label 2 is no image of 0\.\.37")
    with h5py.File(toolbox / "Metadata" / sunrgbd.LABELS, "w") as file:
        file["other"] = 1
    refuse(source, out, r"SUNRGBD2Dseg\.mat: holds other, but not SUNRGBD2Dseg/seglabel")
    write_tables(toolbox, labels, fields=("rgbpath",))
    refuse(source, out, r"SUNRGBDMeta\.mat: frame 1 lacks rgbpath or depthname")
    scipy_io.savemat(toolbox / "Metadata" / sunrgbd.META, {"Other": 1})
    refuse(source, out, r"SUNRGBDMeta\.mat: holds Other, but not SUNRGBDMeta")


def test_damaged_files_are_refused_and_leave_nothing(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    frame = source / "SUNRGBD/xtion/sun3ddata/b/c"  # the last one: two frames are written by then
    for path in (frame / "image/im2.jpg", frame / "depth_bfx/other2.png"):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        refuse(source, out, f"{path.name}: cannot be read as an image")
        path.write_bytes(whole)
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 9), np.uint8)).save(buffer, format="PNG")
    depth = frame / "depth_bfx/other2.png"
    whole = depth.read_bytes()
    depth.write_bytes(buffer.getvalue())
    refuse(source, out, r"other2\.png: holds uint8 .*wanted 16 bits")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(depth)
    refuse(source, out, r"image is \(8, 9\) but depth \(8, 8\)")
    depth.unlink()
    refuse(source, out, r"depth_bfx/d2\.png: no such file, and 0 other images")
    depth.write_bytes(whole)
    table = source / "SUNRGBDtoolbox/Metadata" / sunrgbd.LABELS
    table.write_bytes(table.read_bytes()[:-100])
    refuse(source, out, r"SUNRGBD2Dseg\.mat: cannot be read as HDF5")
    table.unlink()
    refuse(source, out, r"holds no SUNRGBD2Dseg\.mat .*SUNRGBDtoolbox\.zip")
