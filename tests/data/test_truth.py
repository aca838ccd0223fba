"""Which point belongs to which box, and rectangles in 0..1 of the image."""

from __future__ import annotations

import pytest
import torch

from tokenfusion.data.scene_views import Views
from tokenfusion.data.truth import annotated_boxes, kept_rows, nearest_box, to_unit

BOXES = torch.tensor([[0.0, 0, 0, 4, 4, 4, 0], [1.0, 0, 0, 1, 1, 1, 0.5], [9.0, 9, 9, 1, 1, 1, 0]])


def test_of_the_boxes_around_a_point_the_nearest_centre_wins() -> None:
    points = torch.tensor([[0.2, 0, 0], [0.9, 0, 0], [-1.9, 1.9, 1.9], [3.0, 0, 0], [9.4, 9.0, 8.6]])
    assert nearest_box(points, BOXES).tolist() == [0, 1, 0, -1, 2]
    assert nearest_box(points, BOXES[:0]).tolist() == [-1] * 5
    far = torch.tensor([40.0, 30.0, 0.0])  # centres a millimetre apart, far from the origin: rounding must not decide
    pair = torch.tensor([[0.0, 0, 0, 2, 2, 2, 0], [0.002, 0, 0, 2, 2, 2, 0]]) + torch.cat([far, torch.zeros(4)])
    many = (far + torch.tensor([[0.0005, 0, 0], [0.0015, 0, 0]])).repeat(20, 1)
    assert nearest_box(many, pair).tolist() == [0, 1] * 20


def test_rows_of_boxes_that_are_left_out_become_background() -> None:
    owner = torch.tensor([0, 1, 2, 3, -1, 2])
    assert kept_rows(owner, [0, 2], 4).tolist() == [0, -1, 1, -1, -1, 1]
    assert kept_rows(owner, [], 4).tolist() == [-1] * 6
    assert kept_rows(torch.tensor([-1, -1]), [], 0).tolist() == [-1, -1]


def test_the_border_of_the_image_is_zero_and_one() -> None:
    corners = torch.tensor([[-0.5, -0.5, 63.5, 47.5], [-9.0, 11.5, 15.5, 99.0]])
    torch.testing.assert_close(to_unit(corners, (48, 64)), torch.tensor([[0.0, 0, 1, 1], [0, 0.25, 0.25, 1]]))


def test_only_what_is_annotated_and_in_the_image_counts() -> None:
    views = Views(torch.zeros(2, 3, 24, 24), torch.zeros(2, 3, 4), [(48, 64), (48, 64)])
    nan = float("nan")
    found, mask = annotated_boxes(torch.tensor([[-0.5, -0.5, 31.5, 47.5], [nan] * 4, [70.0, 5, 80, 9]]), views)
    assert mask.tolist() == [[True, False, False], [False] * 3]  # rectangles belong to the first view
    assert found[0, 0].tolist() == pytest.approx([0.25, 0.5, 0.5, 1.0])
    assert not found[~mask].any()
    assert not annotated_boxes(torch.zeros(0, 4), views._replace(sizes=[]))[1].any()
