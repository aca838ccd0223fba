"""Pictures of boxes: which pixel gets which colour, what is left out, and that nothing is drawn where nothing is."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from tokenfusion.data import boxes as data_boxes
from tokenfusion.report import boxes as pictures
from tokenfusion.report.boxes import Boxes, draw_above, draw_boxes
from tokenfusion.report.canvas import DASH, GAP, Canvas, _dashes
from tokenfusion.report.maps import SUBSTITUTED

RED = (220, 30, 30)
MATRIX = np.array([[200.0, 150, 0, 0], [0, 100, -200, 0], [0, 1, 0, 0]])  # stands at 0, looks along y
NONE = Boxes(np.zeros((0, 8, 3)), [], np.zeros((0, 3), np.uint8))
NO_POINTS = np.zeros((0, 3))


def boxes(*rows: list[float], name: str = "") -> Boxes:
    found = data_boxes.corners(torch.tensor(rows, dtype=torch.float64)).numpy()
    return Boxes(found, [name] * len(rows), np.array([RED] * len(rows), np.uint8))


def grey(height: int = 200, width: int = 300) -> np.ndarray:
    return np.full((height, width, 3), 128, np.uint8)


def draw(projection: np.ndarray, found: Boxes, truth: Boxes | None = None) -> np.ndarray:
    """Over a grey image, in its own size."""
    return draw_boxes(grey(), projection, found, truth, side=300)


def near(picture: np.ndarray, colour: tuple[int, int, int], by: int = 40) -> np.ndarray:
    """Where a picture shows a colour."""
    return np.abs(picture.astype(int) - colour).max(2) < by


def test_corners_are_ordered_as_the_data_room_orders_them() -> None:
    assert {frozenset(edge) for edge in pictures.EDGES} == {frozenset(edge) for edge in data_boxes.EDGES}
    assert pictures.NEAR_M == data_boxes.NEAR_M


def test_edges_lie_where_they_are_projected() -> None:
    picture = draw(MATRIX, boxes([0.0, 4.0, 0.0, 2.0, 2.0, 1.0, 0.0]))
    left, right = 150 - 200 / 3, 150 + 200 / 3  # of the near face, 3 m ahead
    top, bottom = 100 - 100 / 3, 100 + 100 / 3
    red = near(picture, RED)
    for u, v in ((left, 100), (right, 100), (150, top), (150, bottom)):
        assert red[round(v), round(u)]
    assert not red[:, : round(left) - 3].any()
    assert not red[: round(top) - 3].any()
    assert not red[round(v) - 20, 145:155].any()  # inside there is nothing


def test_edges_of_the_farthest_corner_are_thin() -> None:
    box = boxes([0.0, 4.0, 0.0, 2.0, 2.0, 1.0, 0.3])
    crossed = near(draw(MATRIX, box), RED, 90)[100]  # at the height of the camera only upright edges are met
    x, y, _ = box.corners[0, :4].T
    column = np.round(150 + 200 * x / y).astype(int)
    width = [int(crossed[u - 4 : u + 5].sum()) for u in column]
    assert width.index(min(width)) == y.argmax()
    assert sorted(width)[1] > width[y.argmax()] > 0


def test_true_boxes_are_dashed_and_white() -> None:
    box = [0.0, 4.0, 0.0, 2.0, 2.0, 1.0, 0.0]
    solid = draw(MATRIX, boxes(box))
    dashed = draw(MATRIX, NONE, boxes(box))
    assert near(dashed, (255, 255, 255)).any()
    assert not near(dashed, RED).any()
    row = round(100 - 100 / 3)
    red, white = near(solid, RED)[row, 95:205], near(dashed, (255, 255, 255))[row, 95:205]
    assert red.all()
    assert 0.3 < white.mean() < 0.9


@pytest.mark.parametrize("row", [[0.0, -4.0, 0.0, 1.0, 1.0, 1.0, 0.3], [20.0, 4.0, 0.0, 1.0, 1.0, 1.0, 0.0]])
def test_nothing_is_drawn_behind_or_beside_the_camera(row: list[float]) -> None:
    assert np.array_equal(draw(MATRIX, boxes(row, name="bed")), grey())


def test_no_camera_no_boxes() -> None:
    assert np.array_equal(draw(np.zeros((3, 4)), boxes([0.0, 4, 0, 1, 1, 1, 0], name="bed")), grey())
    assert np.array_equal(draw(MATRIX, NONE, NONE), grey())


def test_a_box_around_the_camera_ends_at_the_border() -> None:
    picture = draw(MATRIX, boxes([0.0, 0.0, 0.0, 1.0, 6.0, 1.0, 0.0], name="carpet"))
    assert near(picture, RED).any()
    ends = [
        line for a, b in pictures.EDGES if (line := visible_edge([0.0, 0.0, 0.0, 1.0, 6.0, 1.0, 0.0], a, b)) is not None
    ]
    assert len(ends) == 8  # four lead to the camera's plane, four lie ahead of it
    assert all(bool((line >= -0.5 - 1e-6).all() and (line <= [299.5 + 1e-6, 199.5 + 1e-6]).all()) for line in ends)


def visible_edge(row: list[float], a: int, b: int) -> np.ndarray | None:
    seen = boxes(row).corners[0] @ MATRIX[:, :3].T
    return pictures._visible(seen[a], seen[b], Canvas(grey()))


def test_small_images_grow() -> None:
    picture = draw_boxes(grey(96, 128), MATRIX * [[0.4], [0.4], [1]], boxes([0.0, 4, 0, 2, 2, 1, 0]), side=640)
    assert picture.shape == (480, 640, 3)
    left = (150 - 200 / 3) * 0.4 * 5 + 2  # u' = (u + 0.5) 5 - 0.5
    assert near(picture, RED)[(round(100 * 0.4 * 5) + 2), round(left)]
    assert draw_boxes(grey(300, 700), MATRIX, NONE).shape == (300, 700, 3)
    with pytest.raises(ValueError, match="wanted uint8"):
        draw_boxes(np.zeros((4, 4)), MATRIX, NONE)


def test_names_cover_no_other_name_and_stay_inside() -> None:
    canvas = Canvas(grey())
    for _ in range(6):
        canvas.name("night_stand", np.array([290.0, 3.0]), RED)
    places = [name[:4] for name in canvas.names]
    assert len(places) == 6
    for k, (left, top, right, bottom) in enumerate(places):
        assert 0 <= left < right <= 300
        assert 0 <= top < bottom <= 200
        for other in places[:k]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
    for _ in range(99):
        canvas.name("night_stand", np.array([290.0, 3.0]), RED)
    assert len(canvas.names) < 105  # no room: left out
    assert near(canvas.finish(), RED).sum() > 500


def test_dashes_begin_and_end_a_line() -> None:
    start, end = np.array([3.0, 1.0]), np.array([103.0, 1.0])
    dashes = _dashes(start, end)
    assert np.allclose(dashes[0][0], start)
    assert np.allclose(dashes[-1][1], end)
    lengths = [b[0] - a[0] for a, b in dashes]
    assert np.allclose(lengths, lengths[0])
    assert 0.7 * DASH < lengths[0] < 1.4 * DASH
    assert np.allclose([b[0][0] - a[1][0] for a, b in itertools.pairwise(dashes)], GAP)
    assert _dashes(start, start) == []


TWO = (boxes([0.0, 2, 0, 1, 2, 1, 0.4], name="bed"), boxes([0.1, 2, 0, 1, 2, 1, 0.4], name="bed"))


@pytest.mark.parametrize(("found", "truth"), [TWO, (NONE, None)])
def test_plans_of_any_content(found: Boxes, truth: Boxes | None) -> None:
    cloud = np.random.default_rng(0).uniform(-2, 4, (500, 6))
    for points in (cloud, NO_POINTS):
        picture = draw_above(points, found, truth, np.zeros(len(points), bool), [np.zeros((3, 4)), MATRIX], side=300)
        assert picture.dtype == np.uint8
        assert picture.shape[1] <= 300
        assert near(picture, pictures.CAMERA).any()
        assert near(picture, RED).any() == bool(found.names)


def test_places_of_a_plan() -> None:
    """y points up the picture, x to the right, and both at one scale."""
    box = [1.0, 3.0, 0.0, 1.0, 0.5, 1.0, 0.0]
    corners = np.array([[-2.0, 0.0, 0.0], [2.0, 4.0, 0.0]])
    plan = pictures._Plan(corners, [boxes(box)], [], 470)
    assert plan.width == plan.height == pytest.approx(470, abs=8)
    low, high = plan(np.array([-1.0, 1.0])), plan(np.array([1.0, 3.0]))
    assert high[0] - low[0] == pytest.approx(2 * plan.scale)
    assert high[1] - low[1] == pytest.approx(-2 * plan.scale)
    picture = draw_above(corners, boxes(box), side=470)
    u, v = plan(np.array([1.0, 3.25])).round().astype(int)  # the middle of the far side
    assert near(picture, RED)[v, u]
    assert not near(picture, RED)[v - 8, u]
    u, v = plan(np.array([1.3, 3.0])).round().astype(int)  # on the stroke that leads to the l side
    assert near(picture, RED, 90)[v, u]
    assert not near(picture, RED, 90)[v, 2 * plan(np.array([1.0, 3.0])).round().astype(int)[0] - u]


def test_a_large_scene_has_few_lines() -> None:
    """The grid's spacing grows with what is to be drawn: a cloud in millimetres, a box that a network blew up."""
    cloud = np.array([[0.0, 0.0, 0.0], [2e4, 2e4, 0.0]])
    plan = pictures._Plan(cloud, [NONE], [], 300)
    ruled = near(plan.paper(NO_POINTS), pictures.LINE, 1)
    assert 15 <= ruled.all(0).sum() <= pictures.LINES + 1
    assert (ruled.all(1).sum(), plan.lines) == (ruled.all(0).sum(), "lines every 1000 metres")
    assert pictures._Plan(cloud / 1000, [NONE], [], 300).lines == "lines every metre"
    huge = boxes([0.0, 0.0, 0.0, 1e30, 1.0, 1.0, 0.0])
    assert pictures._Plan(cloud, [huge], [], 300).spacing > 1e27, "else it would be drawn for ever"
    assert draw_above(cloud, huge, side=300).shape[1] == 300


def test_marked_points_are_orange_and_crowded_ones_dark() -> None:
    cloud = np.array([[-1.0, 0.0, 0.0]] * 60 + [[1.0, 0.0, 0.0]] + [[0.0, 1.0, 0.0]])
    marked = np.arange(62) == 61
    plan = pictures._Plan(cloud, [NONE], [], 400)
    picture = draw_above(cloud, NONE, marked=marked, side=400)
    crowd, alone, orange = (picture[v, u].astype(int) for u, v in plan(cloud[[0, 60, 61], :2]).round().astype(int))
    assert crowd.max() < alone.min() < 255
    assert np.abs(orange - SUBSTITUTED).max() < 60
    plain = draw_above(cloud, NONE, side=400)
    assert not near(plain, SUBSTITUTED).any()


def test_a_camera_is_found_from_its_matrix() -> None:
    angle = 0.6
    turn = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
    place = np.array([1.5, -0.5, 1.2])
    moved = MATRIX[:, :3] @ turn.T
    camera = pictures._camera(np.concatenate([moved, -(moved @ place)[:, None]], 1))
    assert camera is not None
    np.testing.assert_allclose(camera[0], place[:2])
    np.testing.assert_allclose(camera[1], turn[:2, 1])  # it looked along y
    assert pictures._camera(np.zeros((3, 4))) is None
