"""Scenes: functions of (seed, epoch, index), truth in step with points and images, batches; in workers too."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from tokenfusion.data.boxes import axis_aligned_extent, contains
from tokenfusion.data.folder import Folder
from tokenfusion.data.motion import SceneAugment
from tokenfusion.data.prepare import rooms
from tokenfusion.data.scenes import Scene, SceneBatch, Scenes, collate_scenes, draw_rows
from tokenfusion.errors import UserError

K = [[60.0, 0.0, 31.5], [0.0, 60.0, 23.5], [0.0, 0.0, 1.0]]
POSE = [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, -1.0, 0.0, 1.2], [0.0, 0.0, 0.0, 1.0]]  # looks along y
CLASSES = ["bed", "chair", "sofa"]
BOXES = [
    {"class": "sofa", "center": [0.5, 3.0, 0.5], "size": [1.6, 0.8, 1.0], "yaw_rad": 0.3, "box2d": [30, 20, 50, 40]},
    {"class": "bed", "center": [-1.0, 4.0, 0.4], "size": [2.0, 1.4, 0.8], "yaw_rad": -0.2},
    {"class": "sofa", "center": [0.0, -5.0, 0.5], "size": [1.0, 1.0, 1.0], "yaw_rad": 0.0, "box2d": [-20, 5, 10, 90]},
]
SIZE = (24, 48)  # the files are 48 x 64: each axis has a factor of its own


class Found(NamedTuple):
    """What an index function may return."""

    rows: Tensor
    nested: tuple[Tensor, Tensor]


def lowest(xyz: Tensor) -> Found:
    order = xyz[:, 2].argsort()[:3]
    return Found(order, (order + 1, xyz[order]))


def cloud(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    xyz = rng.uniform([-2.5, 1.5, 0], [2.5, 5.5, 1.5], (count, 3))
    return np.concatenate([xyz, rng.random((count, 3))], 1).astype(np.float32)


def write(place: Path, things: list[list[dict[str, Any]]], points: int = 500, **scene: Any) -> Folder:
    """One scene per list of boxes, a photograph each."""
    for name in ("points", "boxes", "camera", "instance", "rgb"):
        (place / name).mkdir(exist_ok=True)
    for index, entries in enumerate(things):
        np.save(place / f"points/{index}.npy", cloud(points, index))
        (place / f"boxes/{index}.json").write_text(json.dumps({"boxes": entries}))
        (place / f"camera/{index}.json").write_text(json.dumps({"K": K, "pose": POSE}))
        pixels = np.random.default_rng(index).integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"rgb/{index}.png")
    (place / "train.txt").write_text("".join(f"{index}\n" for index in range(len(things))))
    files = {"points": "points/{id}.npy", "boxes": "boxes/{id}.json", "camera": "camera/{id}.json"}
    content = {
        "name": "made up",
        "modalities": {"rgb": {"kind": "rgb", "files": "rgb/{id}.png"}},
        "scene": {**files, "classes": CLASSES, **scene},
        "splits": {"train": "train.txt"},
    }
    (place / "dataset.yaml").write_text(yaml.safe_dump(content))
    return Folder(place)


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return write(tmp_path, [BOXES, [], BOXES[:1], BOXES[:2]])


def test_shapes_types_and_a_scene_without_boxes(folder: Folder) -> None:
    scenes = Scenes(folder, "train", ("points", "rgb"), 200, image_size=SIZE, index=lowest)
    batch = collate_scenes([scenes[index] for index in range(4)])
    assert isinstance(batch, SceneBatch)
    assert batch.ids == ["0", "1", "2", "3"]
    assert (batch.points.shape, batch.points.dtype) == ((4, 200, 3), torch.float32)
    assert batch.images is not None
    assert batch.projection is not None
    assert (batch.images.shape, batch.images.dtype) == ((4, 1, 3, *SIZE), torch.float32)
    assert (batch.projection.shape, batch.projection.dtype) == ((4, 1, 3, 4), torch.float32)
    assert isinstance(batch.index, Found)
    assert (batch.index.rows.shape, batch.index.nested[1].shape) == ((4, 3), (4, 3, 3))
    assert torch.equal(batch.points[2][batch.index.rows[2]], batch.index.nested[1][2])
    truth = batch.truth
    assert truth is not None
    assert [tuple(field.shape) for field in truth] == [(4, 3, 7), (4, 3), (4, 3), (4, 200), (4, 1, 3, 4), (4, 1, 3)]
    assert truth.mask.tolist() == [[True] * 3, [False] * 3, [True, False, False], [True, True, False]]
    assert truth.labels.tolist() == [[2, 0, 2], [0] * 3, [2, 0, 0], [2, 0, 0]]
    assert (truth.labels.dtype, truth.point_box.dtype, truth.boxes.dtype) == (torch.int64, torch.int64, torch.float32)
    assert not truth.boxes[~truth.mask].any()
    assert not truth.boxes2d[~truth.mask2d].any()
    assert (truth.point_box[1] == -1).all()
    alone = collate_scenes([scenes[1]]).truth
    assert alone is not None
    assert alone.boxes.shape == (1, 0, 7)
    assert alone.mask2d.shape == (1, 1, 0)


def test_points_alone_have_no_views(folder: Folder) -> None:
    (folder.root / "camera/0.json").unlink()  # nobody asks for it
    batch = collate_scenes([Scenes(folder, "train", points=50)[index] for index in (0, 3)])
    assert batch.images is None
    assert batch.projection is None
    assert batch.index is None
    assert batch.truth is not None
    assert batch.truth.boxes2d.shape == (2, 0, 3, 4)
    assert batch.truth.mask2d.shape == (2, 0, 3)


def test_without_boxes_there_is_no_truth(tmp_path: Path) -> None:
    folder = write(tmp_path, [[], []], boxes=None, classes=[])
    assert collate_scenes([Scenes(folder, "train", points=50)[0]]).truth is None
    with pytest.raises(UserError, match=r"dataset\.yaml: has no scene\.boxes"):
        Scenes(folder, "train", augment=SceneAugment())


def test_more_than_64_boxes_are_all_kept(tmp_path: Path) -> None:
    many = [{**BOXES[1], "center": [k * 0.05 - 2.25, 3, 0.5]} for k in range(90)]
    truth = collate_scenes([Scenes(write(tmp_path, [many]), "train")[0]]).truth
    assert truth is not None
    assert truth.boxes.shape == (1, 90, 7)
    assert truth.point_box.max() > 63


def test_rows_are_drawn_once_each_and_again_only_where_they_are_too_few() -> None:
    generator = torch.Generator().manual_seed(0)
    few = draw_rows(1000, 300, generator)
    assert len(set(few.tolist())) == 300
    assert few.max() > 900
    all_and_more = draw_rows(40, 100, generator)
    assert len(all_and_more) == 100
    assert set(all_and_more.tolist()) == set(range(40))
    assert draw_rows(5, 5, generator).sort().values.tolist() == list(range(5))


def test_without_augmentation_points_and_boxes_are_those_of_the_files(folder: Folder) -> None:
    scene = Scenes(folder, "train", points=500, colour=True)[0]
    order = scene.points[:, 0].argsort()
    whole = torch.from_numpy(cloud(500))
    assert torch.equal(scene.points[order], whole[whole[:, 0].argsort()])
    assert scene.truth is not None
    assert torch.equal(scene.truth.boxes, folder.read_boxes("0").boxes)


def test_a_point_belongs_to_the_nearest_of_the_boxes_around_it(tmp_path: Path) -> None:
    wide = {**BOXES[1], "center": [0, 3.5, 0.75], "size": [5.0, 4.0, 1.5], "yaw_rad": 0.0}
    folder = write(tmp_path, [[wide, {**BOXES[0], "center": [2.0, 3.0, 0.75], "size": [1.0, 3.0, 1.5]}]])
    scene = Scenes(folder, "train", points=500)[0]
    assert scene.truth is not None
    xyz, boxes, owner = scene.points, scene.truth.boxes, scene.truth.point_box
    inside = contains(xyz, boxes)
    for point, around, row in zip(xyz, inside.tolist(), owner.tolist(), strict=True):
        wanted = [k for k in (0, 1) if around[k]]
        wanted.sort(key=lambda k: float((point - boxes[k, :3]).norm()))
        assert row == (wanted[0] if wanted else -1)
    assert len(set(owner.tolist()) - {-1}) == 2


@pytest.mark.parametrize("flip_y", [0.0, 1.0])
def test_points_boxes_and_projections_move_together_and_images_do_not(folder: Folder, flip_y: float) -> None:
    plain = Scenes(folder, "train", ("points", "rgb"), 500, None, 0, SIZE, boxes2d="projected")
    moving = Scenes(folder, "train", ("points", "rgb"), 500, SceneAugment(0.5, flip_y), 0, SIZE, boxes2d="projected")
    angles = set()
    for epoch in range(4):
        moving.set_epoch(epoch)
        for index in (0, 3):
            before, after = plain[index], moving[index]
            assert before.truth is not None
            assert after.truth is not None
            for scene in (before, after):  # which point is which: by where it is seen
                assert scene.projection is not None
                assert scene.truth is not None
                inside = contains(scene.points, scene.truth.boxes)
                owner = scene.truth.point_box
                assert ((owner >= 0) == inside.any(1)).float().mean() > 0.995
            assert before.images is not None
            assert after.images is not None
            assert torch.equal(before.images, after.images)
            assert torch.equal(before.truth.boxes2d, after.truth.boxes2d)
            pixels = [seen(scene) for scene in (before, after)]
            torch.testing.assert_close(pixels[0], pixels[1], atol=2e-3, rtol=1e-4)
            assert (after.points - before.points).abs().max() > 0.05
            angles.add(round(float(after.truth.boxes[0, 6]), 4))
    assert len(angles) == 8


def seen(scene: Scene) -> Tensor:
    """Pixels and depths of all points in an order of their own, [P, 3]."""
    assert scene.projection is not None
    P = scene.projection[0]
    cam = scene.points @ P[:, :3].T + P[:, 3]
    pixels = torch.cat([cam[:, :2] / cam[:, 2:], cam[:, 2:]], 1)
    return pixels[pixels[:, 0].argsort()]


def test_aligned_boxes_are_hulls_after_a_turn(folder: Folder) -> None:
    augment = SceneAugment(0, 0, 5.0, (1, 1), aligned_boxes=True)
    before, after = (Scenes(folder, "train", points=50, augment=a)[0].truth for a in (None, augment))
    assert before is not None
    assert after is not None
    assert (after.boxes[:, 6] == 0).all()
    assert (after.boxes[:, 3:6] != before.boxes[:, 3:6]).any()
    assert (after.boxes[:, 3:5].prod(1) <= axis_aligned_extent(before.boxes)[:, :2].prod(1) * 1.2).all()


def test_items_depend_on_seed_epoch_and_index_only(folder: Folder) -> None:
    def make(seed: int) -> Scenes:
        return Scenes(folder, "train", ("points", "rgb"), 100, SceneAugment(), seed, SIZE, index=lowest, colour=True)

    scenes = make(5)
    first = [scenes[index] for index in range(4)]
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert same(tuple(first), tuple(scenes[index] for index in reversed(range(4)))[::-1])
    assert torch.equal(torch.get_rng_state(), state)  # no draw from the global generator
    scenes.set_epoch(1)
    assert not any(torch.equal(first[index].points, scenes[index].points) for index in range(4))
    assert not torch.equal(make(6)[0].points, first[0].points)


def test_each_repetition_of_an_evaluation_draws_other_points(folder: Folder) -> None:
    scenes = Scenes(folder, "train", points=100)
    first = scenes[0]
    scenes.set_epoch(1)
    second = scenes[0]
    assert not torch.equal(first.points, second.points)
    assert first.truth is not None
    assert second.truth is not None
    assert torch.equal(first.truth.boxes, second.truth.boxes)


def test_workers_see_the_epoch_and_give_the_same_batches(folder: Folder) -> None:
    scenes = Scenes(folder, "train", ("points", "rgb"), 60, SceneAugment(), 1, SIZE, index=lowest)
    loader = DataLoader(
        scenes, 2, num_workers=1, persistent_workers=True, collate_fn=collate_scenes, multiprocessing_context="fork"
    )
    for epoch in (0, 7):
        scenes.set_epoch(epoch)
        for number, batch in enumerate(loader):
            assert same(batch, collate_scenes([scenes[2 * number], scenes[2 * number + 1]])), f"epoch {epoch}"


def test_the_instance_file_says_which_box_a_point_belongs_to(tmp_path: Path) -> None:
    folder = write(tmp_path, [BOXES], instance="instance/{id}.npy")
    owner = np.random.default_rng(1).integers(-1, 3, 500)
    np.save(tmp_path / "instance/0.npy", owner)
    points = torch.from_numpy(cloud(500))[:, :3]
    for classes, rows in ((None, [0, 1, 2, -1]), (["bed"], [-1, 0, -1, -1]), (["chair"], [-1] * 4)):
        scene = Scenes(folder, "train", points=300, classes=classes)[0]
        assert scene.truth is not None
        which = (scene.points[:, None] == points).all(-1).float().argmax(1)
        assert scene.truth.point_box.tolist() == [rows[owner[index]] for index in which]
    np.save(tmp_path / "instance/0.npy", owner + 1)
    with pytest.raises(UserError, match=r"0\.npy: names rows .*3, wanted -1\.\.2"):
        Scenes(folder, "train", points=500)[0]


def test_labels_are_rows_of_the_classes_asked_for(folder: Folder) -> None:
    scenes = Scenes(folder, "train", points=50, classes=["sofa", "bed"])
    assert scenes.classes == ["sofa", "bed"]
    truth = scenes[0].truth
    assert truth is not None
    assert truth.labels.tolist() == [0, 1, 0]
    bed = Scenes(folder, "train", points=50, classes=["chair", "bed"])[0].truth
    assert bed is not None
    assert bed.labels.tolist() == [1]
    assert bed.boxes[:, 1].tolist() == [4]
    only = Scenes(folder, "train", ("points", "rgb"), 50, image_size=SIZE, classes=["sofa"])[0].truth
    assert only is not None
    assert only.boxes[:, 1].tolist() == [3, -5]
    assert only.mask2d.tolist() == [[True, True]]
    with pytest.raises(UserError, match="scene.classes has no 'sofas'; did you mean 'sofa'"):
        Scenes(folder, "train", classes=["sofas"])


def test_annotated_rectangles_scale_with_the_image_and_are_cut_at_its_border(folder: Folder) -> None:
    truth = Scenes(folder, "train", ("points", "rgb"), 50, image_size=SIZE)[0].truth
    assert truth is not None
    assert truth.mask2d.tolist() == [[True, False, True]]
    inside, cut = truth.boxes2d[0, 0].tolist(), truth.boxes2d[0, 2].tolist()
    assert inside == pytest.approx([40.5 / 64, 30.5 / 48, 20 / 64, 20 / 48])
    assert cut == pytest.approx([10.5 / 64 / 2, (5.5 / 48 + 1) / 2, 10.5 / 64, 1 - 5.5 / 48])


def test_projected_rectangles_hold_the_points_of_their_box(folder: Folder) -> None:
    scene = Scenes(folder, "train", ("points", "rgb"), 500, image_size=SIZE, boxes2d="projected")[0]
    assert scene.truth is not None
    assert scene.projection is not None
    assert scene.truth.mask2d.tolist() == [[True, True, False]]  # one stands behind the camera
    P = scene.projection[0]
    for row in (0, 1):
        mine = scene.points[scene.truth.point_box == row]
        assert len(mine) > 10
        cam = mine @ P[:, :3].T + P[:, 3]
        unit = (cam[:, :2] / cam[:, 2:] + 0.5) / torch.tensor([SIZE[1], SIZE[0]])
        centre, size = scene.truth.boxes2d[0, row, :2], scene.truth.boxes2d[0, row, 2:]
        inside = ((unit - centre).abs() <= size / 2 + 1e-5).all(1) | (unit < 0).any(1) | (unit > 1).any(1)
        assert inside.all()
        spread = (unit.amax(0) - unit.amin(0)).clamp(max=1)
        assert (size > 0.7 * spread).all()
        assert (size < 1.8 * spread).all()


def test_rooms_annotated_and_projected_rectangles_agree(tmp_path: Path) -> None:
    rooms.prepare(tmp_path / "rooms", train=6, val=1, height=48, width=64, progress=False)
    folder = Folder(tmp_path / "rooms")
    overlaps, points = [], []
    for kind in ("annotated", "projected"):
        found = Scenes(folder, "train", ("points", "rgb"), 1000, image_size=(48, 64), boxes2d=kind)  # type: ignore[arg-type]
        batch = collate_scenes([found[index] for index in range(6)])
        assert batch.truth is not None
        overlaps.append((batch.truth.boxes2d, batch.truth.mask2d))
        points.append((batch.truth.point_box >= 0).float().mean())
    (a, mask), (b, mask_b) = overlaps
    both = mask & mask_b
    assert both.sum() > 15
    assert 0.05 < points[0] < 0.6
    low = torch.maximum(a[..., :2] - a[..., 2:] / 2, b[..., :2] - b[..., 2:] / 2)
    high = torch.minimum(a[..., :2] + a[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2)
    inner = (high - low).clamp(min=0).prod(-1)
    iou = inner / (a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - inner)
    assert iou[both].median() > 0.7
    assert (inner / a[..., 2:].prod(-1))[both].median() > 0.9  # what is seen of a thing lies in its box's rectangle


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"modalities": ("rgb",)}, r"data\.modalities is \['rgb'\]"),
        ({"modalities": ("points", "depth")}, r"data\.modalities"),
        ({"points": 0}, r"data\.points 0"),
        ({"views": 0, "image_size": SIZE}, r"data\.views 0"),
        ({"image_size": None}, r"data\.image is None"),
        ({"image_size": (0, 5)}, r"data\.image is \(0, 5\)"),
        ({"image_size": SIZE, "boxes2d": "seen"}, "choose annotated or projected"),
        ({"split": "val"}, "no split 'val'"),
    ],
)
def test_wrong_arguments_are_named(folder: Folder, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        Scenes(folder, **{"split": "train", "modalities": ("points", "rgb"), "points": 10, **arguments})


def test_what_a_run_would_miss_is_said_at_once(folder: Folder, tmp_path: Path) -> None:
    bare = write(tmp_path, [[BOXES[1]], []])
    with pytest.raises(UserError, match=r"no box of split 'train' has a box2d; set data\.boxes2d to projected"):
        Scenes(bare, "train", ("points", "rgb"), augment=SceneAugment(), image_size=SIZE)
    assert len(Scenes(bare, "train", ("points", "rgb"), image_size=SIZE)) == 2  # to evaluate, none is needed
    folder = write(tmp_path, [BOXES, BOXES])
    (tmp_path / "rgb/1.png").unlink()
    with pytest.raises(UserError, match=r"rgb/1\.png: no such file; split 'train' lacks 1 of 2 files"):
        Scenes(folder, "train", ("points", "rgb"), image_size=SIZE)
    Scenes(folder, "train", ("points",))
    (tmp_path / "points/0.npy").unlink()
    with pytest.raises(UserError, match=r"points/0\.npy: no such file; split 'train' lacks 1 of 4 files"):
        Scenes(folder, "train")


def test_colours_are_there_where_asked_for_and_possible(folder: Folder, tmp_path: Path) -> None:
    assert Scenes(folder, "train", points=20, colour=True)[0].points.shape == (20, 6)
    np.save(tmp_path / "points/0.npy", cloud(30)[:, :3])
    with pytest.raises(UserError, match=r"points/0\.npy: has no colours"):
        Scenes(folder, "train", points=20, colour=True)[0]


def test_a_class_that_dataset_yaml_does_not_name(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "boxes/0.json").write_text(json.dumps({"boxes": [{**BOXES[0], "class": "soffa"}]}))
    with pytest.raises(UserError, match=r"0\.json: a box has the class 'soffa', which .*dataset\.yaml .* mean 'sofa'"):
        Scenes(folder, "train")[0]


@pytest.mark.skipif("TOKENFUSION_DATA" not in os.environ, reason="real recordings: TOKENFUSION_DATA is not set")
def test_a_real_cloud_has_its_bed_and_its_night_stand(real_data: Path, tmp_path: Path) -> None:
    place = real_data / "detection3d/sunrgbd_000017"
    info = json.loads((place / "sunrgbd_000017_infos.json").read_text())["data_list"][0]
    names = {0: "bed", 7: "night_stand"}
    entries = [
        {
            "class": names[thing["bbox_label_3d"]],
            "center": thing["bbox_3d"][:3],
            "size": thing["bbox_3d"][3:6],
            "yaw_rad": thing["bbox_3d"][6],
        }
        for thing in info["instances"]
    ]
    for name in ("points", "boxes"):
        (tmp_path / name).mkdir()
    (tmp_path / "points/17.bin").symlink_to(place / "000017.bin")
    (tmp_path / "boxes/17.json").write_text(json.dumps({"boxes": entries}))
    (tmp_path / "all.txt").write_text("17\n")
    scene = {"points": "points/{id}.bin", "boxes": "boxes/{id}.json", "classes": ["bed", "night_stand"]}
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump({"name": "s", "scene": scene, "splits": {"all": "all.txt"}}))
    found = Scenes(Folder(tmp_path), "all", points=50_000)[0]
    assert found.truth is not None
    counts = [int((found.truth.point_box == row).sum()) for row in (0, 1)]
    assert found.truth.labels.tolist() == [1, 0]
    assert counts[1] == pytest.approx(18117, abs=60)  # the published box holds so many; with the yaw negated 9106
    assert counts[0] > 500
