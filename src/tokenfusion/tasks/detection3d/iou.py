"""Exact overlap of oriented 3D boxes, compiled for the CPU: two rectangles clipped seen from above, times the common height."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]
MOST = 16  # vertices; two rectangles share at most 8, and rounding may repeat some


def iou3d(a: NDArray[Any], b: NDArray[Any]) -> Floats:
    """Volume of the intersection over that of the union, in float64.

    A box with a size that is not positive overlaps nothing, nor does one with a number that is not finite.

    Args:
        a, b: boxes [n, 7] and [m, 7]: centre, full sizes, yaw (data/boxes.py).

    Returns:
        [n, m] in 0..1.
    """
    return _pairs(np.ascontiguousarray(a, np.float64), np.ascontiguousarray(b, np.float64))


@njit(cache=True)
def _pairs(a: Floats, b: Floats) -> Floats:
    out = np.zeros((len(a), len(b)))
    polygon, spare = np.empty((MOST, 2)), np.empty((MOST, 2))
    for i in range(len(a)):
        for j in range(len(b)):
            out[i, j] = _pair(a[i], b[j], polygon, spare)
    return out


@njit(cache=True)
def _pair(a: Floats, b: Floats, polygon: Floats, spare: Floats) -> float:
    """IoU of two boxes; comparisons are written so that NaN ends in 0."""
    if not (min(a[3], a[4], a[5]) > 0 and min(b[3], b[4], b[5]) > 0):
        return 0.0
    x, y, z = b[0] - a[0], b[1] - a[1], b[2] - a[2]
    height = min(a[5] / 2, z + b[5] / 2) - max(-a[5] / 2, z - b[5] / 2)
    if not height > 0:
        return 0.0
    reach = (math.hypot(a[3], a[4]) + math.hypot(b[3], b[4])) / 2
    if not x * x + y * y < reach * reach:  # the circles around them do not meet
        return 0.0
    common = height * _area_above(a, b, polygon, spare)
    union = a[3] * a[4] * a[5] + b[3] * b[4] * b[5] - common
    iou = common / union if union > 0 else 0.0
    return min(iou, 1.0) if iou > 0 else 0.0


@njit(cache=True)
def _area_above(a: Floats, b: Floats, polygon: Floats, spare: Floats) -> float:
    """Area that two boxes share seen from above: b's rectangle, in a's axes, cut at a's four sides."""
    cos, sin = math.cos(a[6]), math.sin(a[6])
    x, y = b[0] - a[0], b[1] - a[1]
    centre_x, centre_y = cos * x + sin * y, cos * y - sin * x
    cos, sin = math.cos(b[6] - a[6]), math.sin(b[6] - a[6])
    for k in range(4):
        along = b[3] / 2 if k == 0 or k == 3 else -b[3] / 2
        across = b[4] / 2 if k < 2 else -b[4] / 2
        polygon[k, 0] = centre_x + cos * along - sin * across
        polygon[k, 1] = centre_y + sin * along + cos * across
    count = _cut(polygon, 4, 0, 1.0, a[3] / 2, spare)
    count = _cut(spare, count, 0, -1.0, a[3] / 2, polygon)
    count = _cut(polygon, count, 1, 1.0, a[4] / 2, spare)
    count = _cut(spare, count, 1, -1.0, a[4] / 2, polygon)
    twice = 0.0
    for k in range(count):
        after = k + 1 if k + 1 < count else 0
        twice += polygon[k, 0] * polygon[after, 1] - polygon[after, 0] * polygon[k, 1]
    return abs(twice) / 2


@njit(cache=True)
def _cut(polygon: Floats, count: int, axis: int, side: float, limit: float, out: Floats) -> int:
    """The part of a convex polygon where ``side * coordinate <= limit`` (Sutherland and Hodgman); returns its vertices."""
    kept = 0
    for k in range(count):
        after = k + 1 if k + 1 < count else 0
        here, there = limit - side * polygon[k, axis], limit - side * polygon[after, axis]
        if here >= 0:
            out[kept, 0], out[kept, 1] = polygon[k, 0], polygon[k, 1]
            kept += 1
        if (here >= 0) != (there >= 0):
            part = here / (here - there)
            out[kept, 0] = polygon[k, 0] + part * (polygon[after, 0] - polygon[k, 0])
            out[kept, 1] = polygon[k, 1] + part * (polygon[after, 1] - polygon[k, 1])
            kept += 1
    return kept
