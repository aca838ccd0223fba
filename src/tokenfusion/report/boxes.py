"""Pictures of 3D boxes, as functions of arrays: over the image that a camera took, and from above.

Found boxes are solid lines in their class's colour, true ones dashed and white or black: apart in grey print too. Orange
points are those whose token came from the image, as on every other picture of exchanged tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenfusion.report.canvas import CASING, INK, PAPER, Canvas, Colour, text_width
from tokenfusion.report.maps import SUBSTITUTED, Bytes, Mask, checked_image

Floats = NDArray[Any]

RING = ((0, 1), (1, 2), (2, 3), (3, 0))
EDGES = (*RING, *((a + 4, b + 4) for a, b in RING), *((a, a + 4) for a in range(4)))
NEAR_M = 0.05
CAMERA, LINE, MUTED = (0, 84, 166), (226, 226, 226), (89, 98, 109)
MARGIN_M = 0.35  # around everything
CROWD = 99.5  # percent of the points that a plan shows; stray ones may lie far away
LINES = 40  # of the grid, at most so many along a plan
FOUND, TRUE, MARKED, VIEW = "found", "true", "token from the image", "camera"
ROW = 28  # pixels of a line of the legend


class Boxes(NamedTuple):
    """Boxes to draw.

    ``corners`` [K, 8, 3]: upright metres, four below and four above in the same turn, the l side between the first and the
    fourth (as ``data.boxes.corners`` orders them). ``names``: what is written at each, "" = nothing. ``colours`` uint8 [K, 3].
    """

    corners: Floats
    names: Sequence[str]
    colours: Bytes


def draw_boxes(image: Bytes, projection: Floats, found: Boxes, truth: Boxes | None = None, side: int = 640) -> Bytes:
    """Projected boxes over an image, with their names; a small image grows by a whole factor up to ``side`` pixels.

    Args:
        image: uint8 [H, W, 3].
        projection: [3, 4], (u z, v z, z) = P (x, y, z, 1) with pixels from 0 at the centre of the first one; zeros = no
            camera: nothing is drawn.
    """
    height, width = checked_image(image).shape[:2]
    factor = max(side // max(height, width), 1)
    large = Image.fromarray(image).resize((width * factor, height * factor), Image.Resampling.BICUBIC)
    canvas = Canvas(np.asarray(large))
    grow = np.array([[factor, 0, (factor - 1) / 2], [0, factor, (factor - 1) / 2], [0, 0, 1]])
    camera = grow @ projection
    for boxes, dashed in ((found, False), (truth, True)):
        for corners, name, colour in zip(*boxes, strict=True) if boxes is not None else ():
            _wireframe(canvas, camera, corners, name, PAPER if dashed else _colour(colour), dashed)
    return canvas.finish()


def draw_above(
    points: Floats,
    found: Boxes,
    truth: Boxes | None = None,
    marked: Mask | None = None,
    projections: Sequence[Floats] = (),
    side: int = 640,
) -> Bytes:
    """The scene from above: points as ink, boxes with a stroke along their direction, cameras, lines every metre (in a
    large scene every ten, or hundred, ...).

    Args:
        points: [N, 3 or more] upright metres.
        marked: bool [N], points whose token came from the image.
        projections: [3, 4] per camera, as :func:`draw_boxes` takes them; zeros are no camera.
        side: pixels of the longer side.
    """
    places = [place for place in map(_camera, projections) if place is not None]
    plan = _Plan(points, [found, *([truth] if truth is not None else [])], places, side)
    kinds = {FOUND: len(found.names), TRUE: truth is not None, MARKED: marked is not None, VIEW: places}
    legend = _places([*(kind for kind, shown in kinds.items() if shown), plan.lines], plan.width)
    foot = np.full((legend[-1][2] + ROW // 2 + 4, plan.width, 3), 255, np.uint8)
    canvas = Canvas(np.concatenate([plan.paper(points), foot]))
    for boxes, dashed in ((found, False), (truth, True)):
        for corners, name, colour in zip(*boxes, strict=True) if boxes is not None else ():
            _footprint(canvas, plan(corners[:4, :2]), name, INK if dashed else _colour(colour), dashed)
    if marked is not None:
        for point in plan(points[marked, :2]):
            _token(canvas, point)
    for place, ahead in places:
        _viewpoint(canvas, plan(place), ahead)
    for kind, x, y in legend:
        _symbol(canvas, kind, x, plan.height + y)
        canvas.text(kind, x + 30, plan.height + y)
    return canvas.finish()


# ---- over the image ----------------------------------------------------------------------------------------------


def _wireframe(canvas: Canvas, camera: Floats, corners: Floats, name: str, colour: Colour, dashed: bool) -> None:
    """The edges of one box; those that meet in its farthest corner are thin."""
    seen = corners @ camera[:, :3].T + camera[:, 3]
    farthest = int(seen[:, 2].argmax())
    lines = [(_visible(seen[a], seen[b], canvas), farthest in (a, b)) for a, b in EDGES]
    drawn = sorted(((line, hidden) for line, hidden in lines if line is not None), key=lambda entry: not entry[1])
    width = 1.8 if dashed else 2.8
    for line, hidden in drawn:
        canvas.line(line, CASING, (width / 2 if hidden else width) + 1.6, 0.7, dashed)
    for line, hidden in drawn:
        canvas.line(line, colour, width / 2 if hidden else width, dashed=dashed)
    if drawn and name:
        ends = np.concatenate([line for line, _ in drawn])
        at = ends[ends[:, 1].argmax() if dashed else ends[:, 1].argmin()]
        canvas.name(name, at, colour, above=not dashed)


def _visible(a: Floats, b: Floats, canvas: Canvas) -> Floats | None:
    """The part of a projected edge in front of the camera and inside the image: (u z, v z, z) twice -> [2, 2]."""
    sides = np.array([[1, 0, 0.5], [-1, 0, canvas.width - 0.5], [0, 1, 0.5], [0, -1, canvas.height - 0.5], [0, 0, 1]])
    bounds = np.array([0, 0, 0, 0, NEAR_M])
    first, last = sides @ a - bounds, sides @ b - bounds  # >= 0: inside
    low, high = 0.0, 1.0
    for start, end in zip(first, last, strict=True):
        if start < 0 and end < 0:
            return None
        if start < 0 or end < 0:
            cut = start / (start - end)
            low, high = (max(low, cut), high) if start < 0 else (low, min(high, cut))
    if low >= high:
        return None
    ends = np.stack([a + part * (b - a) for part in (low, high)])
    return np.asarray(ends[:, :2] / ends[:, 2:])


# ---- from above --------------------------------------------------------------------------------------------------


class _Plan:
    """Upright metres to pixels of a plan: ``plan(xy [n, 2])``, y upwards."""

    def __init__(
        self, points: Floats, boxes: Sequence[Boxes], places: Sequence[tuple[Floats, Floats]], side: int
    ) -> None:
        crowd = np.percentile(points[:, :2], [100 - CROWD, CROWD], axis=0) if len(points) else np.zeros((0, 2))
        corners = [b.corners[:, :, :2].reshape(-1, 2) for b in boxes]
        everything = np.concatenate([crowd, *corners, *(place[None] for place, _ in places), np.zeros((0, 2))])
        everything = everything if len(everything) else np.zeros((1, 2))
        self.low, self.high = everything.min(0) - MARGIN_M, everything.max(0) + MARGIN_M
        extent = float((self.high - self.low).max())
        self.scale = side / extent
        self.spacing = 10.0 ** max(math.ceil(math.log10(extent / LINES)), 0)
        self.width, self.height = (math.ceil(size * self.scale) for size in self.high - self.low)
        self.width = max(self.width, side // 2)  # room for names

    @property
    def lines(self) -> str:
        """The legend of the grid."""
        return "lines every metre" if self.spacing == 1 else f"lines every {self.spacing:g} metres"

    def __call__(self, xy: Floats) -> Floats:
        return (np.asarray(xy, np.float64) - [self.low[0], self.high[1]]) * [self.scale, -self.scale] - 0.5

    def paper(self, points: Floats) -> Bytes:
        """White with the lines of the grid, and the points as ink: the more above each other, the darker."""
        picture = np.full((self.height, self.width, 3), 255, np.float64)
        for axis, count in ((1, self.width), (0, self.height)):
            start = self.low[0] if axis else -self.high[1]
            end = start + count / self.scale
            for line in range(math.ceil(start / self.spacing), math.floor(end / self.spacing) + 1):
                at = min(round((line * self.spacing - start) * self.scale), count - 1)
                picture[(slice(None), at) if axis else at] = LINE
        column, row = np.floor(self(points[:, :2]) + 0.5).astype(int).T
        inside = (column >= 0) & (column < self.width) & (row >= 0) & (row < self.height)
        counts = np.bincount(row[inside] * self.width + column[inside], minlength=self.height * self.width)
        ink = 1 - np.exp(-counts / max(counts[counts > 0].mean() if counts.any() else 1, 1))
        ink = 0.75 * ink.reshape(self.height, self.width, 1)
        picture = (1 - ink) * picture + ink * np.array(INK)
        return picture.round().astype(np.uint8)


def _camera(projection: Floats) -> tuple[Floats, Floats] | None:
    """Where a camera stands and where it looks, seen from above: two [2]; None for a matrix that is none."""
    matrix = np.asarray(projection, np.float64)
    if abs(np.linalg.det(matrix[:, :3])) < 1e-9:
        return None
    place = -np.linalg.solve(matrix[:, :3], matrix[:, 3])
    return place[:2], matrix[2, :2]


def _footprint(canvas: Canvas, ring: Floats, name: str, colour: Colour, dashed: bool) -> None:
    """A box from above, with a stroke from its centre to its l side."""
    outline = np.concatenate([ring, ring[:1]])
    if not dashed:
        canvas.area(ring, colour, 0.16)
        canvas.line(outline, PAPER, 4.4)
    canvas.line(outline, colour, 1.8 if dashed else 2.8, dashed=dashed)
    canvas.line(np.stack([ring.mean(0), (ring[0] + ring[3]) / 2]), colour, 1.8, dashed=dashed)
    if name:
        at = ring[ring[:, 1].argmax() if dashed else ring[:, 1].argmin()]
        canvas.name(name, at, PAPER if dashed else colour, above=not dashed)


def _viewpoint(canvas: Canvas, place: Floats, ahead: Floats) -> None:
    """A camera: a dot with its field of view."""
    direction = np.array([ahead[0], -ahead[1]]) / max(float(np.hypot(*ahead)), 1e-9)
    across = np.array([-direction[1], direction[0]])
    tips = [place + 17 * direction + turn * 11 * across for turn in (-1, 1)]
    canvas.area(np.stack([place, *tips]), CAMERA, 0.35)
    canvas.line(np.stack([tips[0], place, tips[1]]), CAMERA, 1.8)
    canvas.dot(place, 3.2, CAMERA)


def _token(canvas: Canvas, point: Floats) -> None:
    canvas.dot(point, 2.5, CASING, 0.8)
    canvas.dot(point, 1.8, SUBSTITUTED)


def _places(kinds: Sequence[str], width: int) -> list[tuple[str, int, int]]:
    """Where the entries of a legend stand, (kind, x, y): as many in a row as fit."""
    found, x, y = [], 10, ROW // 2
    for kind in kinds:
        wide = 30 + math.ceil(text_width(kind))
        if x > 10 and x + wide > width:
            x, y = 10, y + ROW
        found.append((kind, x, y))
        x += wide + 18
    return found


def _symbol(canvas: Canvas, kind: str, x: float, y: float) -> None:
    """A line or dot of the plan, 24 pixels wide."""
    stroke = np.array([[x, y], [x + 24, y]])
    if kind == FOUND:
        canvas.line(stroke, MUTED, 3.0)
    elif kind == TRUE:
        canvas.line(stroke, INK, 1.8, dashed=True)
    elif kind == MARKED:
        _token(canvas, stroke.mean(0))
    elif kind == VIEW:
        _viewpoint(canvas, np.array([x + 4, y]), np.array([1.0, 0.0]))
    else:
        for shift in (-5, 5):
            canvas.line(np.array([[x + 12 + shift, y - 10], [x + 12 + shift, y + 10]]), LINE, 1.0)
            canvas.line(np.array([[x + 2, y + shift], [x + 22, y + shift]]), LINE, 1.0)


def _colour(rgb: Bytes) -> Colour:
    red, green, blue = (int(part) for part in rgb)
    return red, green, blue
