"""Suppression and counting: the reference's picks, order, and what happens to odd boxes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tokenfusion.data.boxes import contains, corners, from_groupfree
from tokenfusion.tasks.detection3d.nms import count_inside, nms3d

GOLDEN = Path(__file__).parents[2] / "golden" / "ap_eval"


def row(x: float, size: float = 1.0, yaw: float = 0.0) -> list[float]:
    return [x, 0, 0, size, size, size, yaw]


def test_reference_picks() -> None:
    outputs = np.load(GOLDEN / "outputs.npz")
    for scene in range(12):
        heading = outputs["pred_heading"][scene][:, None]
        boxes = np.concatenate([outputs["pred_center"][scene], outputs["pred_size"][scene], heading], 1)
        boxes = from_groupfree(torch.from_numpy(boxes)).numpy()
        scores = 1 / (1 + np.exp(-outputs["pred_obj_logit"][scene]))
        kept = nms3d(boxes, scores, outputs["pred_sem_logits"][scene].argmax(1), 0.25)
        assert np.array_equal(np.sort(kept), np.flatnonzero(outputs["nms_keep"][scene]))
        assert (np.diff(scores[kept]) <= 0).all()


def test_the_best_stays_and_only_its_class_goes() -> None:
    boxes = np.array([row(0), row(0.1), row(0.2), row(5)])
    scores = np.array([0.5, 0.9, 0.7, 0.1], np.float32)
    assert nms3d(boxes, scores, np.zeros(4, int)).tolist() == [1, 3]
    assert nms3d(boxes, scores, np.array([0, 1, 0, 0])).tolist() == [1, 2, 3]
    assert nms3d(boxes[:0], scores[:0], np.zeros(0, int)).tolist() == []


def test_a_suppressed_box_suppresses_nothing() -> None:
    boxes = np.array([row(0), row(0.5), row(1.0)])  # neighbours overlap by a third
    assert nms3d(boxes, np.array([3.0, 2.0, 1.0]), np.zeros(3, int)).tolist() == [0, 2]


def test_the_threshold_must_be_exceeded() -> None:
    boxes = np.array([row(0), row(0.5)])  # one third
    for threshold, kept in ((0.25, [0]), (1 / 3 + 1e-9, [0, 1])):
        assert nms3d(boxes, np.array([2.0, 1.0]), np.zeros(2, int), threshold).tolist() == kept
    quarter = np.array([[0.0, 0, 0, 5, 1, 1, 0], [3.0, 0, 0, 5, 1, 1, 0]])  # 2 of 8, exact in binary
    assert nms3d(quarter, np.array([2.0, 1.0]), np.zeros(2, int), 0.25).tolist() == [0, 1]


def test_hulls_decide_not_the_boxes() -> None:
    """Two parallel thin boxes on the diagonal do not meet, but their hulls do."""
    boxes = np.array([[0.0, 0, 0, 4, 0.1, 1, np.pi / 4], [0.3, -0.3, 0, 4, 0.1, 1, np.pi / 4]])
    assert nms3d(boxes, np.array([2.0, 1.0]), np.zeros(2, int)).tolist() == [0]


def test_odd_boxes_do_no_harm() -> None:
    boxes = np.array([row(0), row(np.nan), row(0, 0.0), row(0, 0.0), row(0.1, -1.0)])
    kept = nms3d(boxes, np.array([5.0, 4.0, 3.0, 2.0, 1.0]), np.zeros(5, int))
    assert kept.tolist() == [0, 1, 2, 3]  # negative sizes span a hull all the same


def test_equal_scores_are_taken_from_the_end_of_numpys_sort() -> None:
    boxes = np.array([row(0), row(0.1), row(0.2)])
    assert nms3d(boxes, np.ones(3), np.zeros(3, int)).tolist() == [2]


def test_points_in_boxes() -> None:
    rng = np.random.default_rng(0)
    boxes = np.concatenate([rng.normal(size=(9, 3)), rng.uniform(0.5, 2, (9, 3)), rng.uniform(-4, 4, (9, 1))], 1)
    points = rng.normal(size=(3000, 6)).astype(np.float32)
    wanted = contains(torch.from_numpy(points[:, :3]).double(), torch.from_numpy(boxes)).sum(0)
    found = count_inside(points, boxes)
    assert found.tolist() == wanted.tolist()
    assert found.min() > 0
    box = np.array([[0.5, 0.25, 1, 1, 0.5, 2, 0]])
    assert count_inside(corners(torch.from_numpy(box))[0].numpy(), box).tolist() == [8]
    assert count_inside(points[:0], boxes).tolist() == [0] * 9


def test_the_real_frame(real_data: Path) -> None:
    cloud = np.fromfile(real_data / "detection3d" / "sunrgbd_000017" / "000017.bin", np.float32).reshape(-1, 6)
    bed = np.array([[-0.013872, 2.993747, -0.561364, 2.292754, 1.5798, 1.277272, -1.1051997599457748]])
    assert count_inside(cloud, bed).tolist() == [pytest.approx(18117, abs=1)]
    assert count_inside(cloud, bed * [1, 1, 1, 1, 1, 1, -1]).tolist() == [pytest.approx(9106, abs=1)]
