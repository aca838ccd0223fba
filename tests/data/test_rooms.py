"""The procedural rooms: pure, aligned, in the right units, and hard for one modality alone."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from tokenfusion.data import Folder
from tokenfusion.data.furniture import BOX, CARPET, CLASSES, CUSHION, FLOOR, PANEL, WALL
from tokenfusion.data.prepare import rooms as preparation
from tokenfusion.data.rooms import Room, render
from tokenfusion.errors import UserError

SIZE = (96, 128)
SEEDS = range(24)
NAMES = list(CLASSES)
SOLID = ("panel", "cushion", "box", "sofa", "table", "dresser", "locker")  # never merely painted


@pytest.fixture(scope="module")
def frames() -> list[Room]:
    return [render(seed, *SIZE) for seed in SEEDS]


def unproject(room: Room, depth: np.ndarray) -> np.ndarray:
    """Depth and K alone -> camera coordinates [H, W, 3]; written apart from the renderer's own way."""
    rows, columns = np.indices(depth.shape)
    x = (columns - room.K[0, 2]) / room.K[0, 0]
    y = (rows - room.K[1, 2]) / room.K[1, 1]
    return np.stack([x, y, np.ones_like(x)], -1) * depth[..., None]


def in_box(points: np.ndarray, box: np.ndarray, slack: float) -> np.ndarray:
    """Which upright points [N, 3] lie in a box, by the meaning of its seven numbers."""
    cos, sin = np.cos(box[6]), np.sin(box[6])
    x, y, z = (points - box[:3]).T
    own = np.stack([cos * x + sin * y, cos * y - sin * x, z])
    return (np.abs(own) <= box[3:6, None] / 2 + slack).all(0)


def test_same_seed_same_room_and_other_seed_another() -> None:
    first, again, other = render(3, *SIZE), render(3, *SIZE), render(4, *SIZE)
    for name, a, b in zip(Room._fields, first, again, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
    assert (first.label != other.label).mean() > 0.1  # another scene, not only other noise
    assert not np.array_equal(first.pose, other.pose)


def test_global_random_state_is_neither_used_nor_changed() -> None:
    np.random.seed(0)
    before = render(5, 48, 64)
    state = np.random.get_state()[1]
    np.random.seed(1)
    np.testing.assert_array_equal(before.rgb, render(5, 48, 64).rgb)
    np.random.seed(0)
    np.testing.assert_array_equal(state, np.random.get_state()[1])


def test_types_shapes_and_units(frames: list[Room]) -> None:
    for room in frames:
        assert room.rgb.shape == (*SIZE, 3)
        assert room.rgb.dtype == room.label.dtype == room.instance.dtype == np.uint8
        for name in ("depth_m", "true_depth_m", "shade", "texture_edge", "occlusion_edge"):
            assert getattr(room, name).shape == SIZE, name
            assert getattr(room, name).dtype == np.float32, name
        for name in ("normal", "points_xyzrgb", "boxes", "K", "pose"):
            assert getattr(room, name).dtype == np.float32, name
        for name in ("shade", "texture_edge", "occlusion_edge"):
            assert 0 <= getattr(room, name).min() <= getattr(room, name).max() <= 1, name
        assert 0.3 < room.true_depth_m.min() < room.true_depth_m.max() < 9
        assert (room.depth_m >= 0).all()
        assert (room.depth_m > 0).mean() > 0.15
        assert set(np.unique(room.label)) <= {*range(len(CLASSES)), 255}
        assert room.boxes.shape == (len(room.box_class), 7)
        assert (room.boxes[:, 3:6] > 0).all()
        assert (room.K[0, 2], room.K[1, 2]) == ((SIZE[1] - 1) / 2, (SIZE[0] - 1) / 2)
        assert (np.abs(room.boxes[:, 6]) <= np.pi + 1e-5).all()
        assert 0 <= room.points_xyzrgb[:, 3:].min() <= room.points_xyzrgb[:, 3:].max() <= 1


def test_the_scene_does_not_depend_on_the_size() -> None:
    small, large = render(7, 48, 64), render(7, 96, 128)
    np.testing.assert_array_equal(small.pose, large.pose)
    assert (small.label == large.label[::2, ::2]).mean() > 0.9
    wide = render(7, 64, 128)
    assert wide.label.shape == (64, 128)


def test_unprojected_depth_agrees_with_the_normals(frames: list[Room]) -> None:
    for room in frames:
        np.testing.assert_allclose(np.linalg.norm(room.normal, axis=-1), 1, atol=1e-4)
        points = unproject(room, room.true_depth_m)
        assert ((points * room.normal).sum(-1) < 1e-3).all()  # towards the camera
        same = (room.instance[:, 1:] == room.instance[:, :-1]) & (room.occlusion_edge[:, 1:] == 0)
        same &= (np.abs(np.diff(room.normal, axis=1)).max(-1) < 1e-4) & (room.label[:, 1:] != 255)
        step = np.diff(points, axis=1)
        off_plane = np.abs((step * room.normal[:, 1:]).sum(-1)) / np.linalg.norm(step, axis=-1)
        assert np.quantile(off_plane[same], 0.97) < 1e-3  # the rest are steps between parallel faces


def test_pose_is_a_rotation_that_puts_the_floor_at_zero(frames: list[Room]) -> None:
    for room in frames:
        turn = room.pose[:3, :3]
        np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-5)
        assert np.linalg.det(turn) == pytest.approx(1, abs=1e-5)
        upright = unproject(room, room.true_depth_m) @ turn.T + room.pose[:3, 3]
        np.testing.assert_allclose(upright[np.isin(room.label, [FLOOR, CARPET])][:, 2], 0, atol=2e-3)
        np.testing.assert_allclose(
            (room.normal @ turn.T)[room.label == FLOOR], [[0, 0, 1]] * (room.label == FLOOR).sum(), atol=1e-4
        )
        assert abs(turn[0, 2]) < 1e-5  # ahead is y


def test_boxes_hold_their_pixels_and_no_others(frames: list[Room]) -> None:
    for room in frames:
        upright = (unproject(room, room.true_depth_m) @ room.pose[:3, :3].T + room.pose[:3, 3]).reshape(-1, 3)
        instance, label = room.instance.ravel(), room.label.ravel()
        assert instance.max() == len(room.boxes)
        for index, (box, name) in enumerate(zip(room.boxes, room.box_class, strict=True), start=1):
            mine = instance == index
            assert mine.sum() >= mine.size // 800
            assert (label[mine] == name).all()
            assert in_box(upright[mine], box, 0.005).all()
            shrunk = in_box(upright, box, -0.02)  # other things may stand in the hollow of a table or a sofa
            if name in (PANEL, BOX, CUSHION):
                assert (instance[shrunk] == index).all()


def test_all_furniture_in_sight_has_a_box(frames: list[Room]) -> None:
    always_raised = [NAMES.index(name) for name in SOLID]
    for room in frames:
        for label in always_raised:
            without = ((room.label == label) & (room.instance == 0)).sum()
            assert without <= 3 * room.label.size / 800, NAMES[label]  # slivers of a few objects at most


def test_points_are_the_measured_depth(frames: list[Room]) -> None:
    room = frames[2]
    known = room.depth_m > 0
    upright = unproject(room, room.depth_m)[known] @ room.pose[:3, :3].T + room.pose[:3, 3]
    np.testing.assert_allclose(room.points_xyzrgb[:, :3], upright, atol=1e-4)
    np.testing.assert_allclose(room.points_xyzrgb[:, 3:] * 255, room.rgb[known], atol=1e-3)


def test_depth_noise_grows_with_distance(frames: list[Room]) -> None:
    error = np.concatenate([(r.depth_m - r.true_depth_m)[r.depth_m > 0] for r in frames])
    depth = np.concatenate([r.true_depth_m[r.depth_m > 0] for r in frames])
    near, far = error[depth < 2].std(), error[depth > 4].std()
    assert 0.001 < near < 0.01
    assert 3 * near < far < 0.1


def test_every_class_is_there_often_enough() -> None:
    labels = np.stack([render(seed, 48, 64).label for seed in range(80)])
    for index, name in enumerate(CLASSES):
        there = (labels == index).reshape(len(labels), -1).mean(1)
        assert there.mean() > 0.01, name
        assert (there > 0.001).mean() > 0.25, name


def test_some_pictures_are_dark_some_glare_and_some_depth_is_missing_but_never_both() -> None:
    frames = [render(seed, 48, 64) for seed in range(80)]
    useless = np.array([not 60 < room.rgb.mean() < 235 for room in frames])
    patchy = np.array([(room.depth_m == 0).mean() > 0.15 for room in frames])
    assert 0.1 < useless.mean() < 0.4
    assert 0.08 < patchy.mean() < 0.4
    assert not (useless & patchy).any()


def test_shape_tells_what_colour_does_not_and_the_other_way_round() -> None:
    """Panels look like their wall and boxes like their floor; carpets lie in the floor's plane and are vivid."""
    hue: dict[int, list[float]] = {WALL: [], PANEL: [], FLOOR: [], BOX: [], CARPET: [], CUSHION: []}
    for seed in range(60):
        room = render(seed, 48, 64)
        if not 60 < room.rgb.mean() < 235:
            continue
        colours = {label: room.rgb[room.label == label].mean(0) for label in hue if (room.label == label).sum() > 20}
        for thing, ground in ((PANEL, WALL), (BOX, FLOOR), (CARPET, FLOOR), (CUSHION, FLOOR)):
            if thing in colours and ground in colours:
                a, b = (colours[label] / colours[label].sum() for label in (thing, ground))
                hue[thing].append(float(np.abs(a - b).max()))
    assert np.median(hue[PANEL]) < 0.01
    assert np.median(hue[BOX]) < 0.02
    assert np.median(hue[CARPET]) > 0.05
    assert np.median(hue[CUSHION]) > 0.05


def test_a_frame_is_drawn_in_a_fraction_of_a_second() -> None:
    start = time.process_time()
    for seed in range(5):
        render(seed, *SIZE)
    assert (time.process_time() - start) / 5 < 0.2  # about 0.025 on one core of a laptop


def test_prepare_writes_a_folder_that_reads_back(tmp_path: Path) -> None:
    counts = preparation.prepare(tmp_path / "rooms", train=3, val=2, height=48, width=64, seed=1, progress=False)
    assert {key: counts[key] for key in ("train", "val", "classes")} == {"train": 3, "val": 2, "classes": len(CLASSES)}
    folder = Folder(tmp_path / "rooms")
    assert folder.classes == list(CLASSES)
    assert folder.verify() == 5 * 10 + 3
    assert (len(folder.ids("train")), len(folder.ids("val"))) == (3, 2)
    assert not set(folder.ids("train")) & set(folder.ids("val"))

    name, room = folder.ids("val")[0], render(1 * preparation.FRAMES_PER_SEED + 3, 48, 64)
    assert folder.modalities["depth"].limits == (1.0, 8.0)  # what translation codes
    read = folder.read(name, list(folder.modalities))
    np.testing.assert_array_equal(read["rgb"].numpy().transpose(1, 2, 0), room.rgb)
    np.testing.assert_allclose(read["depth"][0].numpy(), room.depth_m, atol=6e-4)
    np.testing.assert_array_equal(read["depth"][0].numpy() == 0, room.depth_m == 0)
    np.testing.assert_allclose(read["normal"].numpy().transpose(1, 2, 0), room.normal, atol=0.012)
    for key, values in (
        ("shade", room.shade),
        ("edge_texture", room.texture_edge),
        ("edge_occlusion", room.occlusion_edge),
    ):
        np.testing.assert_allclose(read[key][0].numpy(), values, atol=0.0021)
    np.testing.assert_array_equal(folder.read_target(name).numpy(), room.label)
    np.testing.assert_array_equal(np.load(folder.root / f"points/{name}.npy"), room.points_xyzrgb)
    camera = json.loads((folder.root / f"camera/{name}.json").read_text())
    np.testing.assert_allclose(camera["K"], room.K, rtol=1e-6)
    np.testing.assert_allclose(camera["pose"], room.pose, rtol=1e-6)
    boxes = json.loads((folder.root / f"boxes/{name}.json").read_text())["boxes"]
    assert [box["class"] for box in boxes] == [folder.classes[k] for k in room.box_class]
    flat = [[*box["center"], *box["size"], box["yaw_rad"]] for box in boxes]
    np.testing.assert_allclose(np.array(flat).reshape(-1, 7), room.boxes, rtol=1e-6)
    for row, box in enumerate(boxes):  # box2d: the pixels of the thing touch all four sides and none lies outside
        x1, y1, x2, y2 = (round(edge + 0.5) for edge in box["box2d"])
        mine = room.instance == row + 1
        assert mine[y1:y2, x1:x2].sum() == mine.sum()
        assert mine[y1:y2, x1:x2][[0, -1]].any(1).all()
        assert mine[y1:y2, x1:x2][:, [0, -1]].any(0).all()


def test_the_scene_names_exactly_the_classes_that_have_boxes(frames: list[Room], tmp_path: Path) -> None:
    preparation.prepare(tmp_path / "rooms", train=1, val=1, height=48, width=64, progress=False)
    folder = Folder(tmp_path / "rooms")
    found = {NAMES[label] for room in frames for label in room.box_class}
    assert set(folder.scene.classes) == found
    assert len(found) == 9
    name, room = folder.ids("train")[0], render(0, 48, 64)
    np.testing.assert_array_equal(folder.read_cloud(name).points, room.points_xyzrgb)
    np.testing.assert_allclose(folder.read_boxes(name).boxes, room.boxes, rtol=1e-6)
    (view,) = folder.read_views(name)
    assert view.image == folder.image_path(name, "rgb")
    np.testing.assert_allclose(view.pose, room.pose, rtol=1e-6)


def test_prepare_is_repeatable(tmp_path: Path) -> None:
    for name in ("a", "b"):
        preparation.prepare(tmp_path / name, train=1, val=1, height=32, width=40, seed=9, progress=False)
    first, second = (tmp_path / name / "MANIFEST.sha256" for name in ("a", "b"))
    assert first.read_text() == second.read_text()


@pytest.mark.parametrize(
    ("change", "word"),
    [({"train": 0}, "train"), ({"seed": -1}, "seed"), ({"height": 8}, "height"), ({"val": 10**6}, "val")],
)
def test_prepare_refuses_numbers_that_make_no_data_set(tmp_path: Path, change: dict[str, int], word: str) -> None:
    wanted = {"train": 1, "val": 1, "height": 48, "width": 64, "seed": 0} | change
    with pytest.raises(UserError, match=word):
        preparation.prepare(tmp_path / "rooms", **wanted, progress=False)
    assert list(tmp_path.iterdir()) == []
