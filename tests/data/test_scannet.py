"""ScanNet from small scans in the official layout, and what its real files hold."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tokenfusion.data.boxes import contains
from tokenfusion.data.cloud import read_cloud
from tokenfusion.data.folder import Folder
from tokenfusion.data.prepare import scannet
from tokenfusion.data.prepare.scannet import Expected, prepare
from tokenfusion.data.prepare.scannet_scan import CLASSES, read_alignment, read_labels
from tokenfusion.data.scene import projection_of
from tokenfusion.data.scenes import Scenes, collate_scenes
from tokenfusion.errors import UserError

FEW = Expected(train=2, val=1)
IDS = ["scene0001_00", "scene0002_00", "scene0003_00"]
ALIGN = np.array([[0.8, 0.6, 0, 1.5], [-0.6, 0.8, 0, -2.0], [0, 0, 1, 0.25], [0, 0, 0, 1]])
K = np.array([[110.0, 0, 60, 0], [0, 112, 40, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
TABLE = (
    "id\traw_category\tcategory\tcount\tnyu40id\n1\toffice chair\tchair\t9\t5\n2\twall\twall\t9\t1\n3\tbed\tbed\t9\t4\n"
)
SEGMENTS = [10, 10, 20, 20, 30, 30, 40, 50]  # eight parts of the mesh, in this order


def mesh(seed: int) -> np.ndarray:
    """Vertices [400, 6] in the scanner's axes: part k of the room at x = k."""
    rng = np.random.default_rng(seed)
    xyz = rng.uniform(0, 0.9, (400, 3)) + np.repeat(np.arange(8), 50)[:, None] * [1, 0, 0]
    return np.concatenate([xyz, rng.integers(0, 256, (400, 3))], axis=1)


def write_ply(path: Path, vertices: np.ndarray) -> None:
    letters = [(name, "<f4") for name in "xyz"] + [(name, "u1") for name in ("red", "green", "blue", "alpha")]
    rows = np.zeros(len(vertices), letters)
    for column, (name, _) in enumerate(letters[:6]):
        rows[name] = vertices[:, column]
    kinds = {"<f4": "float", "u1": "uchar"}
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(rows)}"]
    header += [f"property {kinds[kind]} {name}" for name, kind in letters]
    header += ["element face 1", "property list uchar int vertex_indices", "end_header", ""]
    path.write_bytes("\n".join(header).encode() + rows.tobytes() + b"\x03" + bytes(12))


def write_scan(scans: Path, id: str, seed: int, align: bool = True) -> None:
    folder = scans / id
    folder.mkdir(parents=True)
    write_ply(folder / f"{id}_vh_clean_2.ply", mesh(seed))
    segments = np.repeat(SEGMENTS, 50).tolist()
    (folder / f"{id}_vh_clean_2.0.010000.segs.json").write_text(json.dumps({"segIndices": segments}))
    groups = [
        {"id": 0, "objectId": 0, "label": "office chair", "segments": [10]},
        {"id": 1, "objectId": 1, "label": "wall", "segments": [20]},
        {"id": 2, "objectId": 2, "label": "bed", "segments": [30, 40, 7777]},
        {"id": 3, "objectId": 3, "label": "what nobody has heard of", "segments": [50]},
    ]
    about = {"segmentsFile": f"scannet.{id}_vh_clean_2.0.010000.segs.json", "segGroups": groups}
    (folder / f"{id}.aggregation.json").write_text(json.dumps(about))
    line = "axisAlignment = " + " ".join(map(str, ALIGN.ravel())) + " \n"
    (folder / f"{id}.txt").write_text(f"colorHeight = 80\n{line if align else ''}numDepthFrames = 9\n")


def write_frames(place: Path, id: str, count: int, lost: tuple[int, ...] = ()) -> None:
    folder = place / id
    for part in ("color", "pose"):
        (folder / part).mkdir(parents=True)
    for number in range(count):
        name = f"{number * 100:06d}"
        Image.new("RGB", (120, 80), (number * 20, 50, 90)).save(folder / f"color/{name}.jpg")
        pose = np.array([[0, 0, 1, 0.1 * number], [-1, 0, 0, 0.5], [0, -1, 0, 0.5], [0, 0, 0, 1]])  # looks along x
        text = "-inf -inf -inf -inf\n" * 4 if number in lost else "\n".join(" ".join(map(str, row)) for row in pose)
        (folder / f"pose/{name}.txt").write_text(text)
    (folder / "intrinsics_color.txt").write_text("\n".join(" ".join(map(str, row)) for row in K))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    official = tmp_path / "official"
    for seed, id in enumerate(IDS):
        write_scan(official / "scans", id, seed, align=id != IDS[2])
        write_frames(official / "zip/scannet_frames_25k", id, (5, 2, 3)[seed], {0: (0, 3), 1: (), 2: (0, 1, 2)}[seed])
    (official / "scannetv2-labels.combined.tsv").write_text(TABLE)
    (official / "scannetv2_train.txt").write_text(f"{IDS[1]}\n{IDS[0]}\n")
    (official / "scannetv2_val.txt").write_text(f"{IDS[2]}\n")
    return official


def aligned(seed: int, align: np.ndarray = ALIGN) -> np.ndarray:
    vertices = mesh(seed)
    return np.concatenate([vertices[:, :3] @ align[:3, :3].T + align[:3, 3], vertices[:, 3:] / 255], 1)


def test_points_boxes_and_instances_are_aligned(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "scannet"
    counts = prepare(source, out, progress=False, expected=FEW)
    wanted = {"scans": 3, "train": 2, "val": 1, "classes": 18, "boxes": 6, "images": 5, "scans without images": 1}
    assert {key: counts[key] for key in wanted} == wanted
    folder = Folder(out)
    assert folder.scene.classes == tuple(CLASSES)
    assert (folder.ids("train"), folder.ids("val")) == ([IDS[1], IDS[0]], [IDS[2]])
    assert folder.verify() == 3 * 4 + 5 + 4
    for seed, id in enumerate(IDS):
        whole = aligned(seed, ALIGN if seed < 2 else np.eye(4))
        cloud, found = folder.read_cloud(id), folder.read_boxes(id)
        points = cloud.points.numpy()
        order, order_whole = np.lexsort(points.T), np.lexsort(whole.T)
        np.testing.assert_allclose(points[order], whole[order_whole], atol=2e-6)
        assert found.names == ["chair", "bed"]
        for row, part in enumerate((slice(0, 100), slice(200, 350))):
            low, high = whole[part, :3].min(0), whole[part, :3].max(0)
            np.testing.assert_allclose(found.boxes[row], [*(low + high) / 2, *(high - low), 0], atol=1e-5)
        assert cloud.box is not None
        which = np.full(400, -1)
        which[:100], which[200:350] = 0, 1
        assert (cloud.box.numpy()[order] == which[order_whole]).all()


def test_views_see_what_stands_before_them(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "scannet", views=3, progress=False, expected=FEW)
    folder = Folder(tmp_path / "scannet")
    views = folder.read_views(IDS[0])
    assert [view.image.name for view in views] == ["000.jpg", "001.jpg", "002.jpg"]
    frames = [
        source / f"zip/scannet_frames_25k/{IDS[0]}/color/{n:06d}.jpg" for n in (100, 200, 400)
    ]  # the tracked ones
    assert [view.image.read_bytes() for view in views] == [frame.read_bytes() for frame in frames]
    assert [len(folder.read_views(id)) for id in IDS] == [3, 2, 0]
    spot = np.array([4.2, 0.5, 0.5])  # in the scanner's axes before the camera, whose eye is at x = 0.1
    P = projection_of(views[0].K, views[0].pose)
    seen = P @ torch.from_numpy(np.append(ALIGN[:3, :3] @ spot + ALIGN[:3, 3], 1))
    assert seen.tolist() == pytest.approx([60 * 4.1, 40 * 4.1, 4.1])  # in the middle, as far as it is
    scenes = Scenes(folder, "train", ("points", "rgb"), 100, image_size=(40, 60), views=3, boxes2d="projected")
    batch = collate_scenes([scenes[0], scenes[1]])
    assert batch.projection is not None
    assert batch.projection.flatten(2).any(2).tolist() == [[True, True, False], [True, True, True]]
    assert batch.truth is not None
    assert batch.truth.mask2d.shape == (2, 3, 2)
    assert batch.truth.mask2d[:, :2, 1].all()
    assert not batch.truth.mask2d[0, 2].any()


def test_evenly_spread_frames_are_taken_and_never_more_than_asked(source: Path, tmp_path: Path) -> None:
    for views, expected in ((1, 1), (2, 2), (9, 3)):
        prepare(source, tmp_path / f"out{views}", views=views, progress=False, expected=FEW)
        assert len(Folder(tmp_path / f"out{views}").read_views(IDS[0])) == expected


@pytest.mark.parametrize("how", ["no frames", "views 0"])
def test_without_frames_there_are_points_only(source: Path, tmp_path: Path, how: str) -> None:
    if how == "no frames":
        (source / "zip").rename(tmp_path / "away")
    counts = prepare(source, tmp_path / "scannet", views=10 if how == "no frames" else 0, progress=False, expected=FEW)
    assert str(counts["images"]).startswith("none, points only: ")
    folder = Folder(tmp_path / "scannet")
    assert folder.modalities == {}
    assert folder.scene.camera is None
    truth = collate_scenes([Scenes(folder, "train", points=50)[0]]).truth
    assert truth is not None
    assert truth.boxes.shape == (1, 2, 7)
    with pytest.raises(UserError, match="no modality 'rgb'"):
        Scenes(folder, "train", ("points", "rgb"), image_size=(40, 60))


def test_at_most_so_many_points_are_kept_with_their_instances(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scannet, "POINTS", 80)
    prepare(source, tmp_path / "scannet", progress=False, expected=FEW)
    folder = Folder(tmp_path / "scannet")
    cloud, boxes = folder.read_cloud(IDS[0]), folder.read_boxes(IDS[0]).boxes
    assert cloud.points.shape == (80, 6)
    assert cloud.box is not None
    inside = contains(cloud.points[:, :3], boxes + torch.tensor([0, 0, 0, 1e-4, 1e-4, 1e-4, 0]))
    assert all(inside[row, box] for row, box in enumerate(cloud.box.tolist()) if box >= 0)
    assert set(cloud.box.tolist()) == {-1, 0, 1}
    np.testing.assert_allclose(boxes[0, 3:5], np.ptp(aligned(0)[:100, :2], axis=0), atol=1e-5)  # of all vertices


def test_of_two_aggregations_the_one_of_these_segments_counts(source: Path, tmp_path: Path) -> None:
    folder = source / "scans" / IDS[0]
    whole = json.loads((folder / f"{IDS[0]}.aggregation.json").read_text())
    other = {"segmentsFile": f"scannet.{IDS[0]}_vh_clean.segs.json", "segGroups": []}
    (folder / f"{IDS[0]}_vh_clean.aggregation.json").write_text(json.dumps(other))
    prepare(source, tmp_path / "a", progress=False, expected=FEW)
    assert len(Folder(tmp_path / "a").read_boxes(IDS[0]).names) == 2
    (folder / f"{IDS[0]}.aggregation.json").write_text(json.dumps({**whole, "segmentsFile": ""}))  # told by its name
    prepare(source, tmp_path / "b", progress=False, expected=FEW)
    assert len(Folder(tmp_path / "b").read_boxes(IDS[0]).names) == 2


def test_an_object_whose_parts_another_one_claims_has_no_box(source: Path, tmp_path: Path) -> None:
    path = source / "scans" / IDS[0] / f"{IDS[0]}.aggregation.json"
    content = json.loads(path.read_text())
    content["segGroups"].append({"label": "bed", "segments": [10, 40]})
    path.write_text(json.dumps(content))
    prepare(source, tmp_path / "scannet", progress=False, expected=FEW)
    found = Folder(tmp_path / "scannet").read_boxes(IDS[0])
    assert found.names == ["bed", "bed"]
    np.testing.assert_allclose(found.boxes[0, 3:6], np.ptp(aligned(0)[200:300, :3], axis=0), atol=1e-5)


def damage(source: Path, file: str, content: str | bytes | None) -> None:
    path = source / file
    if content is None:
        path.unlink()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content)


SCAN = f"scans/{IDS[0]}/{IDS[0]}"
SHOT = f"zip/scannet_frames_25k/{IDS[0]}"


@pytest.mark.parametrize(
    ("file", "content", "text"),
    [
        (f"{SCAN}_vh_clean_2.ply", b"ply\n", r"_vh_clean_2\.ply: cannot be read as a point cloud"),
        (f"{SCAN}_vh_clean_2.ply", None, r"holds no scene0001_00.scene0001_00_vh_clean_2\.ply.*1 of 3 scans"),
        (f"{SCAN}.txt", None, r"scene0001_00\.txt: cannot be read"),
        (f"{SCAN}.txt", "axisAlignment = 1 0 0", r"axisAlignment is '1 0 0'"),
        (f"{SCAN}.txt", f"axisAlignment = {' '.join(['2'] * 16)}", "no rotation and shift"),
        (f"{SCAN}_vh_clean_2.0.010000.segs.json", None, r"segs\.json: no such file"),
        (f"{SCAN}_vh_clean_2.0.010000.segs.json", '{"segIndices": [1, 2', r"segs\.json: cannot be read as JSON"),
        (f"{SCAN}_vh_clean_2.0.010000.segs.json", '{"segIndices": [1, 2]}', r"holds 2 segments, .*400 vertices"),
        (f"{SCAN}_vh_clean_2.0.010000.segs.json", "{}", "has no segIndices"),
        (f"{SCAN}.aggregation.json", None, r"holds no scene0001_00\.aggregation\.json"),
        (f"{SCAN}.aggregation.json", "[]", "holds no keys"),
        (f"{SCAN}.aggregation.json", '{"segGroups": [{"label": "bed"}]}', "lacks label or segments"),
        (f"{SCAN}.aggregation.json", '{"segGroups": 5}', "segGroups is no list"),
        (f"{SHOT}/color/000400.jpg", b"\xff\xd8", r"000400\.jpg: cannot be read as an image"),
        (f"{SHOT}/color/000100.jpg", None, r"000100\.jpg: cannot be read as an image"),
        (f"{SHOT}/pose/000100.txt", "1 0 0", r"000100\.txt: cannot be read as 4x4 numbers"),
        (f"{SHOT}/intrinsics_color.txt", "inf " * 16, r"intrinsics_color\.txt: holds numbers that are not finite"),
        (f"{SHOT}/intrinsics_color.txt", None, r"intrinsics_color\.txt: cannot be read"),
    ],
)
def test_a_damaged_scan_stops_the_preparation_or_is_left_out(
    source: Path, tmp_path: Path, file: str, content: str | bytes | None, text: str
) -> None:
    damage(source, file, content)
    with pytest.raises(UserError, match=text) as caught:
        prepare(source, tmp_path / "out", progress=False, expected=FEW)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    counts = prepare(source, tmp_path / "out", on_bad="skip", progress=False, expected=FEW)
    assert (counts["scans"], counts["train"], counts["left out"]) == (2, 1, 1)
    assert Folder(tmp_path / "out").ids("train") == [IDS[1]]
    assert Folder(tmp_path / "out").verify() > 0
    assert list(json.loads((tmp_path / "out/source.json").read_text())["left out"]) == [IDS[0]]


def test_missing_lists_and_tables_say_where_they_come_from(source: Path, tmp_path: Path) -> None:
    def refuse(text: str, **options: Any) -> None:
        with pytest.raises(UserError, match=text):
            prepare(source, tmp_path / "out", **{"progress": False, "expected": FEW, **options})

    refuse(r"scannetv2_train\.txt: lists 2 scans, wanted 1201; it is in Tasks/Benchmark", expected=Expected())
    refuse("--on-bad is 'ask'", on_bad="ask")
    refuse("--views is -1", views=-1)
    (source / "scannetv2_val.txt").rename(source / "val.txt")
    refuse(r"holds no scannetv2_val\.txt in it or below; it is in Tasks/Benchmark of https://github\.com/ScanNet")
    (source / "val.txt").rename(source / "scannetv2_val.txt")
    (source / "scannetv2-labels.combined.tsv").write_text("raw\tid\nchair\t5\n")
    refuse(r"combined\.tsv: is no table with raw_category and nyu40id")
    (source / "scannetv2-labels.combined.tsv").unlink()
    refuse(r"holds no scannetv2-labels\.combined\.tsv")
    (source / "scannetv2-labels.combined.tsv").write_text(TABLE)
    (source / "scans").rename(tmp_path / "away")
    refuse("3 of 3 scans are missing.*; so it is with all 3 scans", on_bad="skip")


@pytest.mark.skipif("TOKENFUSION_DATA" not in os.environ, reason="real recordings: TOKENFUSION_DATA is not set")
def test_real_lists_and_labels(real_data: Path) -> None:
    place = real_data / "splits/scannet"
    labels = read_labels(place / "scannetv2-labels.combined.tsv")
    assert (labels["office chair"], labels["trash can"], labels["wall"]) == (5, 39, 1)
    assert set(CLASSES.values()) <= set(labels.values())
    for split, count in (("train", 1201), ("val", 312)):
        ids = scannet._read_list(place / f"scannetv2_{split}.txt", count)
        assert ids[0].startswith("scene")


@pytest.mark.skipif("TOKENFUSION_DATA" not in os.environ, reason="real recordings: TOKENFUSION_DATA is not set")
def test_a_real_scan_fits_its_boxes_once_it_is_aligned(real_data: Path, tmp_path: Path) -> None:
    place = real_data / "detection3d/scannet"
    info = json.loads((place / "mmdet3d_scannet_infos.json").read_text())["data_list"][0]
    rows = np.ravel(info["axis_align_matrix"])
    (tmp_path / "scene.txt").write_text(f"axisAlignment = {' '.join(map(str, rows))}\n")
    align = torch.from_numpy(read_alignment(tmp_path / "scene.txt"))
    points = read_cloud(place / "mmdet3d_scene0000_00_points.bin").points[:, :3].double()
    boxes = torch.tensor([[*thing["bbox_3d"], 0.0] for thing in info["instances"]], dtype=torch.float64)
    assert boxes.shape == (27, 7)
    inside = contains(points @ align[:3, :3].T + align[:3, 3], boxes)
    for row, box in enumerate(boxes):  # each hull touches its object on all six sides, up to the points left out
        mine = (points @ align[:3, :3].T + align[:3, 3])[inside[:, row]]
        assert len(mine) > 30
        assert ((mine.amax(0) - mine.amin(0)) / box[3:6]).min() > 0.8
    unaligned = contains(points, boxes)
    assert int((unaligned.sum(0) < 30).sum()) > 3
