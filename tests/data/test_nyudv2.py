"""NYUDv2 from small archives in the official layout, and the official split and class map where they are at hand."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tokenfusion.data.folder import Folder
from tokenfusion.data.prepare import nyudv2
from tokenfusion.data.prepare.archive import Staging, read_mat
from tokenfusion.data.prepare.nyudv2 import Expected, prepare, read_classes, read_splits
from tokenfusion.errors import UserError

h5py = pytest.importorskip("h5py")
scipy_io = pytest.importorskip("scipy.io")

FEW = Expected(frames=3, train=2, val=1)
REAL = Path(os.environ.get("TOKENFUSION_DATA", "/nowhere"))
needs_real = pytest.mark.skipif("TOKENFUSION_DATA" not in os.environ, reason="TOKENFUSION_DATA is not set")


@pytest.fixture(autouse=True)
def each_table_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child process behind read_mat takes half a second: tests that refuse ten times keep its answers."""
    answers: dict[tuple[object, ...], dict[str, Any]] = {}

    def read(path: Path, names: list[str], fields: tuple[str, ...] = ()) -> dict[str, Any]:
        key = (path, path.read_bytes(), *names)
        if key not in answers:
            answers[key] = read_mat(path, names, fields)
        return answers[key]

    monkeypatch.setattr(nyudv2, "read_mat", read)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three frames, written as MATLAB does: HDF5 with reversed axes, beside the two small MATLAB 5 files."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "official"
    folder.mkdir()
    with h5py.File(folder / nyudv2.ARCHIVE, "w") as file:
        depth_m = np.repeat(rng.uniform(0.7, 9.9, (3, 64, 48)).astype(np.float32), 10, 1).repeat(10, 2)
        file["images"] = np.repeat(rng.integers(0, 255, (3, 3, 64, 48), dtype=np.uint8), 10, 2).repeat(10, 3)
        file["depths"] = depth_m
        file["rawDepths"] = np.where(np.arange(480) < 20, np.float32(0), depth_m)
        file["labels"] = np.repeat(rng.integers(0, 895, (3, 64, 48)).astype(np.uint16), 10, 1).repeat(10, 2)
        file["names"] = np.zeros((1, 894), np.uint64)
    scipy_io.savemat(folder / nyudv2.SPLITS, {"trainNdxs": np.array([[1], [3]]), "testNdxs": np.array([[2]])})
    names = np.array([[f"class {index}" for index in range(1, 41)]], dtype=object)
    scipy_io.savemat(folder / nyudv2.MAPPING, {"mapClass": np.arange(894)[None] % 40 + 1, "className": names})
    return folder


def edit(source: Path, key: str, value: np.ndarray | None) -> None:
    with h5py.File(source / nyudv2.ARCHIVE, "r+") as file:
        del file[key]
        if value is not None:
            file[key] = value


def refuse(source: Path, out: Path, text: str, expected: Expected = FEW) -> None:
    """The preparation ends with that line and leaves nothing behind."""
    with pytest.raises(UserError, match=text) as caught:
        prepare(source, out, progress=False, expected=expected)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    assert not list(out.parent.glob(".*partial*"))


def test_every_pixel_arrives_where_it_belongs(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "nyudv2"
    summary = prepare(source, out, progress=False, expected=FEW)
    assert [summary[key] for key in ("frames", "train", "val", "classes")] == [3, 2, 1, 40]
    assert len(str(summary[f"sha256 {nyudv2.ARCHIVE}"])) == 64
    folder = Folder(out)
    assert folder.ids("train") == ["000001", "000003"]
    assert folder.ids("val") == ["000002"]
    assert folder.classes[0] == "class 1"
    assert folder.verify() == 3 * 3 + 4
    with h5py.File(source / nyudv2.ARCHIVE, "r") as file:
        for index, id in enumerate(("000001", "000002", "000003")):
            assert np.array_equal(np.asarray(Image.open(folder.image_path(id, "rgb"))), file["images"][index].T)
            raw = file["labels"][index].T[6:474, 7:632].astype(int)
            wanted = np.where(raw == 0, 255, (raw - 1) % 40)
            assert np.array_equal(folder.read_target(id).numpy(), wanted)
            depth = folder.read(id, ["depth"])["depth"][0].numpy()
            assert np.abs(depth - file["depths"][index].T[6:474, 7:632]).max() < 0.00051
    assert summary["missing depth pixels"] == 0


def test_raw_depth_keeps_its_holes_and_source_may_be_the_file(source: Path, tmp_path: Path) -> None:
    summary = prepare(source / nyudv2.ARCHIVE, tmp_path / "raw", depth="raw", progress=False, expected=FEW)
    assert summary["missing depth pixels"] == 3 * 20 * 640
    depth = Folder(tmp_path / "raw").read("000002", ["depth"])["depth"]
    assert (depth[0, :14] == 0).all()
    assert (depth[0, 14:] > 0).all()


def test_wrong_archives_are_refused_by_name(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    archive = nyudv2.ARCHIVE.replace(".", r"\.")
    refuse(source, out, r"splits\.mat: holds 2 training and 1 test frames, wanted 795 and 654", Expected())
    with h5py.File(source / nyudv2.ARCHIVE, "r") as file:
        images, depths, labels = file["images"][:], file["depths"][:], file["labels"][:]
    edit(source, "images", images[:2])
    refuse(source, out, rf"{archive}: images is uint8 \[2, .*wanted uint8 \[3,")
    edit(source, "images", images)
    for value in (np.nan, -1.0, 70.0):
        bad = depths.copy()
        bad[1, 5, 5] = value
        edit(source, "depths", bad)
        refuse(source, out, rf"{archive}: the depth of frame 2 is not within")
    edit(source, "depths", depths)
    bad = labels.copy()
    bad[2, 5, 5] = 895
    edit(source, "labels", bad)
    refuse(source, out, rf"{archive}: frame 3 holds label 895")
    edit(source, "labels", labels.astype(np.uint8))
    refuse(source, out, rf"{archive}: labels is uint8")
    edit(source, "labels", None)
    refuse(source, out, rf"{archive}: holds depths, images, names, rawDepths, but not labels")


def test_truncated_and_missing_files_are_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    whole = (source / nyudv2.ARCHIVE).read_bytes()
    for keep in (0, 1000, len(whole) // 2, len(whole) - 5):
        (source / nyudv2.ARCHIVE).write_bytes(whole[:keep])
        refuse(source, out, "nyu_depth_v2_labeled.mat: cannot be read as HDF5")
    (source / nyudv2.ARCHIVE).write_bytes(whole)
    scipy_io.savemat(source / nyudv2.SPLITS, {"trainNdxs": np.array([[1], [2]]), "testNdxs": np.array([[2]])})
    refuse(source, out, r"splits\.mat: its indices are not 1\.\.3")
    scipy_io.savemat(source / nyudv2.SPLITS, {"trainNdxs": np.array([[1], [2]])})
    refuse(source, out, r"splits\.mat: holds trainNdxs, but not testNdxs")
    (source / nyudv2.SPLITS).unlink()
    refuse(source, out, r"holds no splits\.mat.*indoor_seg_sup")
    with pytest.raises(UserError, match="choose 'filled' or 'raw'"):
        prepare(source, out, depth="bfx")  # type: ignore[arg-type]


def test_a_wrong_class_map_is_refused(source: Path, tmp_path: Path) -> None:
    names = np.array([["a"] * 13], dtype=object)
    scipy_io.savemat(source / nyudv2.MAPPING, {"mapClass": np.arange(894)[None] % 13 + 1, "className": names})
    refuse(source, tmp_path / "out", r"classMapping40\.mat: maps 894 labels to 13 classes")


def prepare_and_stop(source: Path, out: Path, ready: Any) -> None:
    """Run in a child process: the second frame never gets written."""
    write = nyudv2._write_frame

    def stop(staging: Staging, name: str, rgb: np.ndarray, depth_m: np.ndarray, label: np.ndarray) -> int:
        if name == "000002":
            ready.send("ready")
            ready.recv()
        return write(staging, name, rgb, depth_m, label)

    nyudv2._write_frame = stop
    prepare(source, out, progress=False, expected=FEW)


def test_a_killed_preparation_leaves_no_data_set_and_the_next_one_succeeds(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process
    child = process(target=prepare_and_stop, args=(source, out, there), daemon=True)
    child.start()
    assert here.recv() == "ready"
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".out.partial-*"))) == 1
    assert not out.exists()
    prepare(source, out, progress=False, expected=FEW)
    assert Folder(out).verify() == 13
    assert not list(tmp_path.glob(".*partial*"))
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        prepare(source, out, progress=False, expected=FEW)


@needs_real
def test_the_official_split_and_class_map() -> None:
    splits = read_splits(REAL / "splits/nyuv2/splits.mat")
    assert splits["train"] == (REAL / "nyuv2/train.txt").read_text().split()
    classes = read_classes(REAL / "splits/nyuv2/classMapping40.mat")
    rows = [line.split("\t") for line in (REAL / "nyuv2/map894to40.tsv").read_text().splitlines()]
    assert [int(row[2]) for row in rows] == classes.table[1:].tolist()
    names = [line.split("\t")[1] for line in (REAL / "nyuv2/classes40.txt").read_text().splitlines()]
    assert names == classes.names
