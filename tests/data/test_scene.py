"""Boxes and cameras: what the files mean, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenfusion.data.scene import is_rigid, projection_of, read_boxes, read_camera
from tokenfusion.errors import UserError

K = [[500.0, 0.0, 320.0], [0.0, 510.0, 240.0], [0.0, 0.0, 1.0]]
POSE = [[1.0, 0.0, 0.0, 0.5], [0.0, 0.0, 1.0, -2.0], [0.0, -1.0, 0.0, 1.5], [0.0, 0.0, 0.0, 1.0]]  # looks along y
BOX = {"class": "bed", "center": [1, 2, 3], "size": [2.0, 1.5, 0.5], "yaw_rad": 0.25}


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_boxes_with_and_without_rectangles_and_none_at_all(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", {"boxes": [BOX, {**BOX, "class": "sofa", "box2d": [1, 2, 30, 40], "note": "x"}]})
    found = read_boxes(path)
    assert found.boxes.tolist() == [[1, 2, 3, 2, 1.5, 0.5, 0.25]] * 2
    assert found.names == ["bed", "sofa"]
    assert found.boxes2d[0].isnan().all()
    assert found.boxes2d[1].tolist() == [1, 2, 30, 40]
    none = read_boxes(write(path, {"boxes": []}))
    assert (none.boxes.shape, none.names, none.boxes2d.shape) == ((0, 7), [], (0, 4))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "Invalid JSON"),
        ('{"boxes": [', "Invalid JSON"),
        ([], "object"),
        ({}, "the key 'boxes' is missing"),
        ({"boxes": [{k: v for k, v in BOX.items() if k != "class"}]}, "'boxes.0.class' is missing"),
        ({"boxes": [BOX, {**BOX, "center": [1, 2]}]}, r"boxes\.1\.center"),
        (
            {"boxes": [{**BOX, "size": [1, 0, 1]}]},
            r"boxes\.0: size is \[1\.0, 0\.0, 1\.0\]; wanted three lengths above 0",
        ),
        ({"boxes": [{**BOX, "yaw_rad": "east"}]}, r"boxes\.0\.yaw_rad: .*came: 'east'"),
        ('{"boxes": [{"class": "a", "center": [NaN, 0, 0], "size": [1, 1, 1], "yaw_rad": 0}]}', r"boxes\.0\.center\.0"),
        ({"boxes": [{**BOX, "box2d": [5, 5, 5, 9]}]}, r"box2d is .* x1 < x2"),
        ({"boxes": [{**BOX, "box2d": [5, 5, 6]}]}, r"boxes\.0\.box2d: wanted 4 numbers \(came: '\[5, 5, 6\]'\)"),
        ({"boxes": [{**BOX, "size": [1, 1, 1, 1]}]}, r"boxes\.0\.size: wanted 3 numbers"),
        ({"boxes": [{**BOX, "size": [1e30, 1, 1]}]}, r"boxes\.0: .*wanted metres, none beyond 1e\+06"),
        ({"boxes": [{**BOX, "center": [0, -1e7, 0]}]}, r"boxes\.0: .*wanted metres, none beyond 1e\+06"),
    ],
)
def test_wrong_boxes_are_named_in_one_line(tmp_path: Path, content: Any, text: str) -> None:
    with pytest.raises(UserError, match=text) as caught:
        read_boxes(write(tmp_path / "a.json", content))
    assert str(caught.value).startswith(str(tmp_path / "a.json"))
    assert "\n" not in str(caught.value)


def test_a_camera_of_one_image_and_one_of_several(tmp_path: Path) -> None:
    (one,) = read_camera(write(tmp_path / "a.json", {"K": K, "pose": POSE}), Path("photo.jpg"))
    assert one.image == Path("photo.jpg")
    assert (one.K.tolist(), one.pose.tolist()) == (K, POSE)
    content = {"views": [{"image": f"rgb/s/{n}.jpg", "K": K, "pose": POSE} for n in range(3)]}
    views = read_camera(write(tmp_path / "a.json", content), root=Path("data"))
    assert [view.image for view in views] == [Path(f"data/rgb/s/{n}.jpg") for n in range(3)]
    assert read_camera(tmp_path / "a.json")[2].image == tmp_path / "rgb/s/2.jpg"
    assert read_camera(write(tmp_path / "a.json", {"views": []})) == []


def changed(rows: list[list[float]], row: int, column: int, value: float) -> list[list[float]]:
    return [
        [value if (r, c) == (row, column) else entry for c, entry in enumerate(line)] for r, line in enumerate(rows)
    ]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"pose": POSE}, "the key 'K' is missing"),
        ({"K": K}, "the key 'pose' is missing"),
        ({"K": K[:2], "pose": POSE}, r"a\.json: K: wanted 3x3 numbers"),
        ({"K": [row[:2] for row in K], "pose": POSE}, r"a\.json: K: wanted 3x3 numbers"),
        ({"K": 5, "pose": POSE}, r"a\.json: K: wanted 3x3 numbers \(came: '5'\)"),
        ({"K": K, "pose": POSE[:3]}, r"a\.json: pose: wanted 4x4 numbers"),
        ({"views": [{"image": "a.jpg", "K": K, "pose": K}]}, r"a\.json: views\.0\.pose: wanted 4x4 numbers"),
        ({"K": changed(K, 0, 0, 1e150), "pose": POSE}, r"K: holds 1e\+150; wanted pixels, none beyond 1e\+06"),
        ({"K": changed(K, 0, 1, -1e9), "pose": POSE}, r"K: holds -1e\+09; wanted pixels"),
        ({"K": K, "pose": changed(POSE, 0, 3, 1e308)}, r"pose: shifts by \[1e\+308, .*wanted metres"),
        ({"K": changed(K, 0, 0, 0.0), "pose": POSE}, "K: wanted focal lengths above 0"),
        ({"K": changed(K, 2, 2, 0.0), "pose": POSE}, "K: wanted .* last row 0 0 1"),
        ({"K": changed(changed(K, 1, 0, 510.0), 0, 1, 500.0), "pose": POSE}, "K: wanted"),  # singular
        ({"K": K, "pose": changed(POSE, 0, 0, 1.01)}, "pose: is no rotation and shift"),
        ({"K": K, "pose": changed(POSE, 0, 0, -1.0)}, "pose: is no rotation and shift"),  # a mirror
        ({"K": K, "pose": changed(POSE, 3, 0, 1.0)}, "pose: is no rotation and shift"),
        ({"K": K, "pose": changed(POSE, 1, 3, math.inf)}, r"pose\.1\.3"),
        (
            {"views": [{"image": "a.jpg", "K": K, "pose": POSE}, {"image": "b.jpg", "K": K}]},
            r"'views\.1\.pose' is missing",
        ),
        ({"views": [{"image": "../a.jpg", "K": K, "pose": POSE}]}, r"views\.0\.image: .*leaves the data set's folder"),
        ({"views": [{"image": "/a.jpg", "K": K, "pose": POSE}]}, "leaves the data set's folder"),
    ],
)
def test_wrong_cameras_are_named_in_one_line(tmp_path: Path, content: Any, text: str) -> None:
    with pytest.raises(UserError, match=text) as caught:
        read_camera(write(tmp_path / "a.json", content), Path("photo.jpg"))
    assert str(caught.value).startswith(str(tmp_path / "a.json"))
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    mark = chr(0xFEFF)
    assert read_boxes(write(tmp_path / "a.json", mark + json.dumps({"boxes": [BOX]}))).names == ["bed"]
    camera = mark + json.dumps({"K": K, "pose": POSE})
    assert len(read_camera(write(tmp_path / "a.json", camera), Path("photo.jpg"))) == 1


def test_missing_files_and_a_camera_without_its_image(tmp_path: Path) -> None:
    for read in (read_boxes, read_camera):
        with pytest.raises(UserError, match=r"a\.json: no such file"):
            read(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"a\.json: belongs to one image, but none is named"):
        read_camera(write(tmp_path / "a.json", {"K": K, "pose": POSE}))


def test_rotations_are_rigid_within_a_thousandth() -> None:
    pose = torch.tensor(POSE, dtype=torch.float64)
    assert is_rigid(pose)
    assert is_rigid(pose + 1e-4 * torch.tensor([[1.0, 1, 1, 0]] * 3 + [[0.0] * 4]))
    assert not is_rigid(2 * pose)


def test_the_projection_is_what_a_camera_sees() -> None:
    """The camera stands at (0.5, -2, 1.5) and looks along y: right is x, down is -z."""
    P = projection_of(torch.tensor(K, dtype=torch.float64), torch.tensor(POSE, dtype=torch.float64))
    ahead = P @ torch.tensor([0.5, 2.0, 1.5, 1.0], dtype=torch.float64)
    assert ahead.tolist() == pytest.approx([320 * 4, 240 * 4, 4])  # in the middle of the image, 4 m away
    beside = P @ torch.tensor([1.5, 2.0, 1.0, 1.0], dtype=torch.float64)
    assert (beside[:2] / beside[2]).tolist() == pytest.approx([320 + 500 / 4, 240 + 510 * 0.5 / 4])
    assert (P @ torch.tensor([0.5, -3.0, 1.5, 1.0], dtype=torch.float64))[2] == pytest.approx(-1)  # behind
