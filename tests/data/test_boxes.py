"""Boxes: known corners, conventions, motion, and their rectangles in an image."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tokenfusion.data import boxes as bx

BED = torch.tensor([1.0, 2.0, 0.5, 2.0, 1.2, 1.0, math.pi / 2])  # l points ahead
MATRIX = torch.tensor([[100.0, 50.0, 0.0, 0.0], [0.0, 40.0, -100.0, 0.0], [0.0, 1.0, 0.0, 0.0]])  # at 0, looks along y


def some_boxes(count: int) -> Tensor:
    scale = torch.tensor([2.0, 2.0, 1.0, 0.0, 0.0, 0.0, 2.0])
    boxes = torch.randn(count, 7, dtype=torch.float64) * scale
    boxes[:, 3:6] = 0.3 + 2 * torch.rand(count, 3, dtype=torch.float64)
    return boxes


def moved(points: Tensor, matrix: list[list[float]]) -> Tensor:
    return points @ points.new_tensor(matrix).T


def same_solid(a: Tensor, b: Tensor) -> bool:
    """Two sets of corners, whatever their order."""
    return bool((torch.cdist(a, b).amin(-1) < 1e-9).all() and (torch.cdist(b, a).amin(-1) < 1e-9).all())


def test_known_corners_in_the_documented_order() -> None:
    low = [[0.4, 3, 0], [0.4, 1, 0], [1.6, 1, 0], [1.6, 3, 0]]
    wanted = torch.tensor([*low, *([x, y, 1] for x, y, _ in low)], dtype=torch.float32)
    torch.testing.assert_close(bx.corners(BED), wanted, rtol=0, atol=1e-6)
    assert bx.corners(torch.zeros(2, 0, 5, 7)).shape == (2, 0, 5, 8, 3)


def test_edges_are_the_twelve_of_a_box() -> None:
    found = bx.corners(BED)
    lengths = sorted(float((found[a] - found[b]).norm()) for a, b in bx.EDGES)
    np.testing.assert_allclose(lengths, [1.0] * 4 + [1.2] * 4 + [2.0] * 4, rtol=1e-6)
    assert len({frozenset(edge) for edge in bx.EDGES}) == 12


def test_contains_faces_and_nothing_beyond() -> None:
    points = torch.tensor([[1.0, 3.0, 0.5], [1.0, 3.01, 0.5], [1.55, 2.9, 0.9], [1.65, 2.0, 0.5], [1.0, 2.0, 1.1]])
    assert bx.contains(points, BED[None])[:, 0].tolist() == [True, False, True, False, False]
    assert bx.contains(points, torch.zeros(0, 7)).shape == (5, 0)
    assert bx.contains(torch.zeros(0, 3), BED[None]).shape == (0, 1)


def test_contains_is_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes, points = some_boxes(7), 3 * torch.randn(1000, 3, dtype=torch.float64)
    whole = bx.contains(points, boxes)
    monkeypatch.setattr(bx, "BLOCK", 50)
    assert torch.equal(bx.contains(points, boxes), whole)
    assert 0 < int(whole.sum()) < 1000
    for k, box in enumerate(boxes):  # a convex hull says the same
        faces = bx.corners(box)
        axes = torch.stack([faces[0] - faces[1], faces[0] - faces[3], faces[4] - faces[0]])
        part = (points - faces[2]) @ axes.T / axes.square().sum(1)
        assert torch.equal(((part >= 0) & (part <= 1)).all(1), whole[:, k])


def test_hull_of_a_turned_box() -> None:
    boxes = some_boxes(20)
    found = bx.corners(boxes)
    torch.testing.assert_close(bx.axis_aligned_extent(boxes), found.amax(-2) - found.amin(-2))
    aligned = bx.axis_aligned(boxes)
    torch.testing.assert_close(bx.corners(aligned).amax(-2), found.amax(-2))
    assert (aligned[:, 6] == 0).all()
    kept = bx.with_hull_sizes(boxes)
    assert torch.equal(kept[:, [0, 1, 2, 6]], boxes[:, [0, 1, 2, 6]])
    assert torch.equal(kept[:, 3:6], aligned[:, 3:6])


def test_votenet_and_groupfree_conventions() -> None:
    line = torch.tensor([1.0, 2.0, 0.5, 0.6, -1.0, 0.5, 0.0, 2.0])  # w l h half, direction ahead
    torch.testing.assert_close(bx.from_votenet_label(line), BED)
    heading = -math.atan2(2.0, 0.0)  # as VoteNet computes it
    official = torch.tensor([1.0, 2.0, 0.5, 1.0, 0.6, 0.5, heading])
    torch.testing.assert_close(bx.from_votenet(official), BED)
    torch.testing.assert_close(bx.to_votenet(BED), official)
    assert torch.equal(bx.from_groupfree(bx.from_groupfree(BED)), BED)
    assert bx.from_groupfree(BED)[6] == -BED[6]


def test_wrapped_angles() -> None:
    angle = torch.tensor([0.1, -3.0, math.pi, 4.0, -4.0, 20.0], dtype=torch.float64)
    wrapped = bx.wrap_angle(angle)
    assert torch.equal(wrapped[:2], angle[:2])  # to the bit
    torch.testing.assert_close(wrapped.cos(), angle.cos())
    torch.testing.assert_close(wrapped.sin(), angle.sin())
    assert bool(((wrapped >= -math.pi) & (wrapped < math.pi)).all())


@pytest.mark.parametrize("angle", [0.4, -2.5, 3.1])
def test_boxes_move_with_their_corners(angle: float) -> None:
    boxes = some_boxes(10)
    cos, sin = math.cos(angle), math.sin(angle)
    motions = [
        (bx.flip_x(boxes), [[-1, 0, 0], [0, 1, 0], [0, 0, 1]]),
        (bx.flip_y(boxes), [[1, 0, 0], [0, -1, 0], [0, 0, 1]]),
        (bx.rotate_z(boxes, angle), [[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]),
        (bx.scale(boxes, 1.1), [[1.1, 0, 0], [0, 1.1, 0], [0, 0, 1.1]]),
    ]
    for found, matrix in motions:
        for got, before in zip(bx.corners(found), bx.corners(boxes), strict=True):
            assert same_solid(got, moved(before, matrix))
        direction = torch.stack([boxes[:, 6].cos(), boxes[:, 6].sin(), torch.zeros(10)], 1)
        turned = moved(direction, matrix)
        turned = turned / turned.norm(dim=1, keepdim=True)
        torch.testing.assert_close(torch.stack([found[:, 6].cos(), found[:, 6].sin()], 1), turned[:, :2])


def test_a_box_ahead_of_the_camera() -> None:
    box = torch.tensor([[0.0, 4.0, 0.0, 1.0, 2.0, 1.0, 0.0]])  # 3 to 5 m ahead
    found, visible = bx.project_boxes(box, MATRIX, (81, 101))
    half = 100 * 0.5 / 3  # the near face is the largest
    torch.testing.assert_close(found, torch.tensor([[50 - half, 40 - half, 50 + half, 40 + half]]))
    assert visible.tolist() == [True]


def test_rectangles_end_at_the_border_and_behind_the_camera() -> None:
    boxes = torch.tensor(
        [
            [0.0, 0.5, 0.0, 1.0, 4.0, 0.5, 0.0],  # the camera is inside
            [0.0, -3.0, 0.0, 1.0, 1.0, 1.0, 0.0],  # behind
            [9.0, 3.0, 0.0, 1.0, 1.0, 1.0, 0.0],  # beside
            [1.0, 1.0, 0.0, 1.0, 3.0, 0.5, 0.0],  # on the right, from behind the camera to 2.5 m ahead of it
        ]
    )
    found, visible = bx.project_boxes(boxes, MATRIX, (81, 101))
    assert visible.tolist() == [True, False, False, True]
    torch.testing.assert_close(found[0], torch.tensor([-0.5, -0.5, 100.5, 80.5]))
    assert found[1:3].abs().sum() == 0
    torch.testing.assert_close(found[3], torch.tensor([50 + 100 * 0.5 / 2.5, -0.5, 100.5, 80.5]))


def test_a_missing_view_sees_nothing() -> None:
    found, visible = bx.project_boxes(some_boxes(3), torch.zeros(3, 4, dtype=torch.float64), (10, 10))
    assert not visible.any()
    assert found.abs().sum() == 0
    assert bx.project_boxes(torch.zeros(0, 7), MATRIX, (10, 10))[0].shape == (0, 4)


def test_rectangles_hold_every_projected_point() -> None:
    """Points spread through a box that reaches behind the camera: those in front fall into its rectangle."""
    box = torch.tensor([[0.3, 1.0, 0.1, 2.6, 0.2, 0.2, 1.3]], dtype=torch.float64)
    spread = torch.rand(20000, 3, dtype=torch.float64) - 0.5
    local = spread * box[0, 3:6]
    cos, sin = math.cos(1.3), math.sin(1.3)
    points = moved(local, [[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) + box[0, :3]
    size = (4001, 4001)
    matrix = MATRIX.double()
    matrix[0, 1], matrix[1, 1] = 2000, 2000
    seen = points @ matrix[:, :3].T
    pixels = (seen[:, :2] / seen[:, 2:])[seen[:, 2] > bx.NEAR_M]
    pixels = pixels.clamp(-0.5, 4000.5)
    found, visible = bx.project_boxes(box, matrix, size)
    assert visible.all()
    assert bool(((pixels >= found[0, :2] - 1e-6) & (pixels <= found[0, 2:] + 1e-6)).all())
    assert len(pixels) < 20000
    low, high = pixels.amin(0), pixels.amax(0)
    assert bool(((high - low) > 0.8 * (found[0, 2:] - found[0, :2])).all())  # and is not much too large


def test_the_real_frame(real_data: Path) -> None:
    folder = real_data / "detection3d" / "sunrgbd_000017"
    info = json.loads(next(folder.glob("*.json")).read_text())["data_list"][0]
    matrix = torch.zeros(3, 4, dtype=torch.float64)
    matrix[:, :3] = torch.tensor(info["images"]["CAM0"]["depth2img"], dtype=torch.float64)
    matrix[:2] -= matrix[2]  # pixels from 0
    boxes = torch.tensor([entry["bbox_3d"] for entry in info["instances"]], dtype=torch.float64)
    found, visible = bx.project_boxes(boxes, matrix, (530, 730))
    assert visible.all()
    bed = found[1].tolist()
    np.testing.assert_allclose(bed, [185, 136, 648, 520], atol=2)
    points = torch.from_numpy(np.fromfile(folder / "000017.bin", np.float32).reshape(-1, 6)[:, :3].copy())
    assert abs(int(bx.contains(points, boxes.float())[:, 1].sum()) - 18117) <= 2
