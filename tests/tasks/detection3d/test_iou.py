"""Overlap of boxes: the reference's numbers, special cases, and points counted at random."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenfusion.data.boxes import contains, from_groupfree
from tokenfusion.tasks.detection3d.iou import iou3d

GOLDEN = Path(__file__).parents[2] / "golden" / "ap_eval"
UNIT = [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]


def iou(a: list[float], b: list[float]) -> float:
    return float(iou3d(np.array([a]), np.array([b]))[0, 0])


def test_reference_numbers() -> None:
    outputs = np.load(GOLDEN / "outputs.npz")
    a, b = (from_groupfree(torch.from_numpy(outputs[name])).numpy() for name in ("pair_a", "pair_b"))
    found = iou3d(a, b)
    np.testing.assert_allclose(found.diagonal(), outputs["iou3d"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(iou3d(b, a), found.T, rtol=0, atol=1e-12)
    flat_a, flat_b = a.copy(), b.copy()
    flat_a[:, 2] = flat_b[:, 2] = 0
    flat_a[:, 5] = flat_b[:, 5] = 1
    np.testing.assert_allclose(iou3d(flat_a, flat_b).diagonal(), outputs["iou2d"], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("other", "wanted"),
    [
        (UNIT, 1.0),
        ([0, 0, 0, 1, 1, 1, math.pi / 2], 1.0),
        ([0, 0, 0, 1, 1, 1, math.pi / 4], 1 / math.sqrt(2)),  # a regular octagon: 2 (sqrt 2 - 1) of the square
        ([0.5, 0, 0, 1, 1, 1, 0], 1 / 3),
        ([0, 0, 0.5, 1, 1, 1, 0], 1 / 3),
        ([0, 0, 0, 2, 2, 2, 0.3], 1 / 8),
        ([1, 0, 0, 1, 1, 1, 0], 0.0),  # they touch
        ([0, 0, 1, 1, 1, 1, 0], 0.0),
        ([0.9, 0.9, 0, 0.5, 0.5, 1, 0], 0.0),  # circles meet, boxes do not
        ([0, 0, 0, 0, 1, 1, 0], 0.0),
        ([0, 0, 0, -1, -1, 1, 0], 0.0),
        ([math.nan, 0, 0, 1, 1, 1, 0], 0.0),
        ([0, 0, 0, 1, 1, 1, math.nan], 0.0),
        ([0, 0, 0, math.inf, 1, 1, 0], 0.0),
        ([0, 0, 0, 1e-200, 1e-200, 1e-200, 0], 0.0),
    ],
)
def test_special_cases(other: list[float], wanted: float) -> None:
    assert iou(UNIT, other) == pytest.approx(wanted, abs=1e-12)
    assert iou(other, UNIT) == pytest.approx(wanted, abs=1e-12)


def test_a_box_and_itself_turned_fully() -> None:
    rng = np.random.default_rng(0)
    boxes = np.concatenate([rng.normal(size=(50, 3)), rng.uniform(0.1, 3, (50, 3)), rng.uniform(-9, 9, (50, 1))], 1)
    assert (iou3d(boxes, boxes).diagonal() == 1).all()
    turned = boxes + np.array([0, 0, 0, 0, 0, 0, math.pi])
    np.testing.assert_allclose(iou3d(boxes, turned).diagonal(), 1, atol=1e-12)


def test_random_pairs_against_counted_points() -> None:
    rng = np.random.default_rng(1)
    a = np.concatenate([0.4 * rng.normal(size=(12, 3)), rng.uniform(0.5, 2, (12, 3)), rng.uniform(-4, 4, (12, 1))], 1)
    points = torch.from_numpy(rng.uniform(-3, 3, (200_000, 3)))
    inside = contains(points, torch.from_numpy(a)).double()
    both = inside.T @ inside
    either = inside.sum(0)[:, None] + inside.sum(0) - both
    np.testing.assert_allclose(iou3d(a, a), (both / either).numpy(), atol=0.03)
    assert iou3d(a[:0], a).shape == (0, 12)
    assert iou3d(a, a[:0]).shape == (12, 0)


def test_nothing_leaves_zero_to_one() -> None:
    """Nearly equal boxes far from the origin, where rounding is largest."""
    rng = np.random.default_rng(2)
    a = np.tile([900.0, -700.0, 3.0, 2.0, 1.0, 1.0, 0.7], (200, 1))
    b = a + 1e-13 * rng.normal(size=(200, 7))
    found = iou3d(a, b)
    assert ((found >= 0) & (found <= 1)).all()
    assert found.min() > 1 - 1e-6
