"""Which of many overlapping proposals stay: non-maximum suppression in 3D, and how many points a box holds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from tokenfusion.data.boxes import axis_aligned_extent

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def nms3d(boxes: NDArray[Any], scores: NDArray[Any], labels: NDArray[Any], threshold: float = 0.25) -> Integers:
    """Greedy suppression among boxes of one class, on the axis-aligned hulls (Group-Free's protocol).

    The best box stays and suppresses those of its class whose IoU with it exceeds the threshold; then the next best.
    Equal scores: the order that numpy's sort happens to give, taken from its end, as in the reference.

    Args:
        boxes: [P, 7].
        scores: [P].
        labels: [P] integers.

    Returns:
        Rows of the boxes that stay, the best first.
    """
    tensor = torch.from_numpy(np.asarray(boxes, np.float64))
    half = axis_aligned_extent(tensor).numpy() / 2
    centre = tensor[:, :3].numpy()
    return _survivors(centre - half, centre + half, np.asarray(labels, np.int64), np.argsort(scores), float(threshold))


@njit(cache=True)
def _survivors(low: Floats, high: Floats, labels: Integers, order: Integers, threshold: float) -> Integers:
    """``order``: rows by ascending score."""
    volume = (high[:, 0] - low[:, 0]) * (high[:, 1] - low[:, 1]) * (high[:, 2] - low[:, 2])
    gone = np.zeros(len(order), np.bool_)
    kept = np.empty(len(order), np.int64)
    count = 0
    for rank in range(len(order) - 1, -1, -1):
        best = order[rank]
        if gone[best]:
            continue
        kept[count] = best
        count += 1
        for other in order[:rank]:
            if labels[other] != labels[best] or gone[other]:
                continue
            common = 1.0
            for axis in range(3):
                common *= max(0.0, min(high[best, axis], high[other, axis]) - max(low[best, axis], low[other, axis]))
            union = volume[best] + volume[other] - common
            gone[other] = union > 0 and common / union > threshold  # two boxes without volume do not touch
    return kept[:count].copy()


def count_inside(points: NDArray[Any], boxes: NDArray[Any]) -> Integers:
    """How many points lie in each box, its faces included: points [N, 3 or more], boxes [P, 7] -> [P]."""
    xyz = np.ascontiguousarray(points[:, :3].T, np.float64)
    return _counts(xyz[0], xyz[1], xyz[2], np.ascontiguousarray(boxes, np.float64))


@njit(cache=True)
def _counts(x: Floats, y: Floats, z: Floats, boxes: Floats) -> Integers:
    """Free of branches, so that several points are looked at together: 20 times faster."""
    counts = np.zeros(len(boxes), np.int64)
    for k in range(len(boxes)):
        centre_x, centre_y, centre_z = boxes[k, 0], boxes[k, 1], boxes[k, 2]
        half_l, half_w, half_h = boxes[k, 3] / 2, boxes[k, 4] / 2, boxes[k, 5] / 2
        cos, sin = math.cos(boxes[k, 6]), math.sin(boxes[k, 6])
        count = 0
        for n in range(len(x)):
            right, ahead = x[n] - centre_x, y[n] - centre_y
            along, across = abs(cos * right + sin * ahead), abs(cos * ahead - sin * right)
            count += (along <= half_l) & (across <= half_w) & (abs(z[n] - centre_z) <= half_h)
        counts[k] = count
    return counts
