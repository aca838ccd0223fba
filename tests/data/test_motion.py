"""Motions of a scene: points, boxes and projections stay together, whatever is drawn."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tokenfusion.data.boxes import contains
from tokenfusion.data.motion import Motion, SceneAugment, move_boxes, move_points, move_projection, recolour
from tokenfusion.errors import UserError

MOTIONS = [Motion(*values) for values in itertools.product((False, True), (False, True), (0.0, 0.4, -2.0), (1.0, 0.85))]
BOXES = torch.tensor([[0.5, 2.0, 0.4, 2.0, 1.0, 0.8, 0.6], [-1.0, 3.0, 0.5, 0.6, 0.9, 1.0, -2.5]])


def cloud() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(4000, 3, generator=generator) * torch.tensor([5.0, 5.0, 1.5]) - torch.tensor([2.5, 0.0, 0.3])


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_point_stays_in_its_pixel(motion: Motion) -> None:
    projection = torch.tensor([[500.0, 320, 0, 10], [0, 240, -500, 700], [0, 1, 0, 0.5]], dtype=torch.float64)
    points = cloud().double()
    moved = move_points(points, motion)
    before = points @ projection[:, :3].T + projection[:, 3]
    P = move_projection(projection, motion)
    torch.testing.assert_close(moved @ P[:, :3].T + P[:, 3], before, rtol=1e-12, atol=1e-9)
    if motion != Motion():
        assert (moved - points).abs().max() > 0.1
    views = move_projection(torch.stack([projection, torch.zeros(3, 4)]), motion)  # a missing view stays missing
    torch.testing.assert_close(views, torch.stack([P, torch.zeros_like(P)]))


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_point_stays_in_its_box(motion: Motion) -> None:
    points = cloud()
    before = contains(points, BOXES)
    after = contains(move_points(points, motion), move_boxes(BOXES, motion))
    assert before.sum(0).min() > 50
    assert (before != after).sum() <= 2  # on a face, rounding decides


@pytest.mark.parametrize("motion", MOTIONS)
def test_aligned_boxes_become_the_hull_of_what_they_were(motion: Motion) -> None:
    points = cloud()
    flat = torch.cat([BOXES[:, :6], torch.zeros(2, 1)], 1)
    moved = move_boxes(flat, motion, aligned=True)
    assert (moved[:, 6] == 0).all()
    assert not (contains(points, flat) & ~contains(move_points(points, motion), moved + 1e-5)).any()
    if motion.angle_rad == 0:
        torch.testing.assert_close(moved[:, 3:6], motion.scale * flat[:, 3:6])
    else:
        assert (moved[:, 3:5] > motion.scale * flat[:, 3:5].min(1, keepdim=True).values).all()


def test_the_order_is_mirror_turn_scale() -> None:
    quarter = Motion(flip_x=True, angle_rad=math.pi / 2, scale=2.0)
    moved = move_points(torch.tensor([[1.0, 0.0, 3.0, 0.7]]), quarter)
    torch.testing.assert_close(moved, torch.tensor([[0.0, -2.0, 6.0, 0.7]]))  # what stands beside x y z stays
    (box,) = move_boxes(torch.tensor([[1.0, 0, 0, 4, 2, 1, 0.3]]), quarter)
    torch.testing.assert_close(box, torch.tensor([0, -2.0, 0, 8, 4, 2, math.pi - 0.3 + math.pi / 2 - 2 * math.pi]))


def test_draws_fill_their_ranges_and_depend_on_the_generator_alone() -> None:
    augment = SceneAugment(flip_x=0.5, flip_y=0.25, rotation_deg=30, scale=(0.85, 1.15))
    drawn = [augment.draw(torch.Generator().manual_seed(seed)) for seed in range(400)]
    assert drawn[:20] == [augment.draw(torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert 160 < sum(motion.flip_x for motion in drawn) < 240
    assert 70 < sum(motion.flip_y for motion in drawn) < 130
    angles = sorted(math.degrees(motion.angle_rad) for motion in drawn)
    assert -30 <= angles[0] < -29
    assert 29 < angles[-1] <= 30
    scales = sorted(motion.scale for motion in drawn)
    assert 0.85 <= scales[0] < 0.86
    assert 1.14 < scales[-1] <= 1.15
    nothing = SceneAugment(flip_x=0, flip_y=0, rotation_deg=0, scale=(1, 1))
    assert nothing.draw(torch.Generator().manual_seed(0)) == Motion()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"flip_x": 1.5}, "data.flip_x 1.5"),
        ({"rotation_deg": -3}, "data.rotation_deg is -3"),
        ({"scale": (0.0, 1.0)}, r"data.scale is \[0.0, 1.0\]"),
        ({"scale": (1.2, 1.0)}, "data.scale"),
    ],
)
def test_ranges_that_make_no_sense_are_refused(change: dict[str, object], text: str) -> None:
    with pytest.raises(UserError, match=text):
        SceneAugment(**change)  # type: ignore[arg-type]


def test_colours_change_within_their_limits_and_some_are_lost() -> None:
    rgb = torch.full((5000, 3), 0.5)
    changed = recolour(rgb, torch.Generator().manual_seed(3))
    lost = (changed == 0).all(1)
    assert 0.25 < lost.double().mean() < 0.35
    kept = changed[~lost]
    assert 0.5 * 0.8 - 0.05 - 0.025 <= kept.min() < kept.max() <= 0.5 * 1.2 + 0.05 + 0.025
    assert (kept.amax(0) - kept.amin(0)).max() < 0.0501  # gain and shift are those of the whole cloud
    assert recolour(torch.ones(50, 3), torch.Generator().manual_seed(1)).max() <= 1
