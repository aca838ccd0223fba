"""A small vectorised ray caster: a room, solids and painted rectangles in it, their textures and their light.

Lengths are metres. The room fills 0..size on three axes, z points up. Vectors are float32 rows: ``[3, N]``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]  # float32 throughout; numpy's stubs widen mixed expressions
Ints = NDArray[np.int64]
Colour = tuple[float, float, float]

BOX, CYLINDER, BALL = range(3)  # shapes
PLAIN, STRIPES, CHECKER, DOTS, PLANKS, PLASTER, DRAWERS = range(7)  # patterns
ROUND = 3  # the face number of a curved surface; 0, 1, 2 are faces across the axis of that number
WALL, FLOOR, CEILING = range(3)  # surfaces of the room itself; solids follow, then paints
UNLABELLED = 255


class Material(NamedTuple):
    """What a surface looks like: reflectances 0..1 (linear light), the pattern's period and frame in metres."""

    pattern: int
    main: Colour
    second: Colour
    period: float = 0.3
    frame: float = 0.0


class Solid(NamedTuple):
    """A box, upright cylinder or ball; ``half`` are half sizes along its own axes, turned by ``yaw_rad``."""

    shape: int
    centre: Colour
    half: Colour
    yaw_rad: float
    material: Material
    label: int
    instance: int


class Paint(NamedTuple):
    """A flat rectangle on a face of the room: no geometry, only another material and label."""

    axis: int
    high: bool  # on the far face of that axis (size) or on the near one (0)
    centre: tuple[float, float]  # along the other two axes, in their order
    half: tuple[float, float]
    turn_rad: float
    material: Material
    label: int


class Scene(NamedTuple):
    """Everything that rays can meet; ``materials`` and ``labels`` are those of wall, floor and ceiling."""

    size: Colour
    materials: tuple[Material, Material, Material]
    labels: tuple[int, int, int]
    solids: list[Solid]
    paints: list[Paint]
    lamp: Colour
    fill: Colour  # direction from which weak daylight comes


class Hits(NamedTuple):
    """What N rays met. ``surface`` counts wall, floor, ceiling, then solids, then paints."""

    t: Floats  # [N] in lengths of the ray's direction
    point: Floats  # [3, N]
    normal: Floats  # [3, N] unit, towards the ray's origin
    surface: Ints  # [N]
    face: Ints  # [N]
    u: Floats  # [N] metres from the middle of the face
    v: Floats  # [N]
    solid: Ints  # [N] index into solids; -1 = the room


def _spans(solid: Solid, origin: Floats, ray: Floats) -> tuple[list[Floats], list[Floats]]:
    """Where rays enter and leave each of the convex parts whose intersection is the solid."""
    cos, sin = np.float32(np.cos(solid.yaw_rad)), np.float32(np.sin(solid.yaw_rad))
    x, y, z = (origin[k] - np.float32(solid.centre[k]) for k in range(3))
    at = (cos * x + sin * y, cos * y - sin * x, z)
    way = (cos * ray[0] + sin * ray[1], cos * ray[1] - sin * ray[0], ray[2])
    near, far = [], []
    axes = {BOX: (0, 1, 2), CYLINDER: (2,), BALL: ()}[solid.shape]
    for k in axes:
        step = 1.0 / np.where(np.abs(way[k]) < 1e-6, np.float32(1e-6), way[k])
        middle, reach = -at[k] * step, np.float32(solid.half[k]) * np.abs(step)
        near.append(middle - reach)
        far.append(middle + reach)
    if solid.shape != BOX:
        n = 2 if solid.shape == CYLINDER else 3
        a = sum(way[k] * way[k] for k in range(n)) + np.float32(1e-9)
        b = sum(way[k] * at[k] for k in range(n))
        c = sum(at[k] * at[k] for k in range(n)) - np.float32(solid.half[0] ** 2)
        square = b * b - a * c
        root = np.sqrt(np.maximum(square, 0))
        near.append(np.where(square > 0, (-b - root) / a, np.float32(np.inf)))
        far.append(np.where(square > 0, (-b + root) / a, np.float32(-np.inf)))
    return near, far


def _inside_outline(solid: Solid, origin: Floats, axes: Floats, screen: Floats) -> Ints:
    """Rays that can meet the solid at all: those inside the rectangle around its corners on the image plane.

    ``axes [3, 3]`` has the camera's right, down, forward as rows; ``screen [2, N]`` the rays at forward = 1.
    """
    cos, sin = np.cos(solid.yaw_rad), np.sin(solid.yaw_rad)
    signs = np.array([[i, j, k] for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)]).T * np.array(solid.half)[:, None]
    corners = np.stack([cos * signs[0] - sin * signs[1], sin * signs[0] + cos * signs[1], signs[2]])
    seen = axes @ (corners + np.array(solid.centre)[:, None] - origin)
    if seen[2].min() < 0.05:  # reaches behind the camera: no outline
        return np.arange(screen.shape[1]) if seen[2].max() > 0.05 else np.empty(0, np.int64)
    flat = seen[:2] / seen[2]
    (left, top), (right, bottom) = flat.min(1) - 1e-3, flat.max(1) + 1e-3
    return np.flatnonzero((screen[0] >= left) & (screen[0] <= right) & (screen[1] >= top) & (screen[1] <= bottom))


def cast(scene: Scene, origin: Floats, axes: Floats, screen: Floats) -> Hits:
    """What rays from one camera meet first.

    Args:
        origin: camera centre [3, 1]; must lie inside the room.
        axes: the camera's right, down and forward directions as rows [3, 3].
        screen: ray directions (x / z, y / z) in the camera [2, N]; ``Hits.t`` is then the depth along forward.
    """
    ray = (axes.T @ np.concatenate([screen, np.ones_like(screen[:1])])).astype(np.float32)
    size = np.array(scene.size, np.float32)[:, None]
    safe = np.where(np.abs(ray) < 1e-6, np.float32(1e-6), ray)
    leave = (np.where(safe > 0, size, np.float32(0)) - origin) / safe
    face = leave.argmin(0)
    t = np.take_along_axis(leave, face[None], 0)[0]
    solid = np.full(t.shape, -1)
    for index, item in enumerate(scene.solids):
        rays = _inside_outline(item, origin, axes, screen)
        if not rays.size:
            continue
        near, far = (np.stack(part) for part in _spans(item, origin, ray[:, rays]))
        enter = near.max(0)
        met = (enter < far.min(0)) & (enter > 0.02) & (enter < t[rays])
        won = rays[met]
        part = near[:, met].argmax(0)
        t[won], solid[won] = enter[met], index
        if item.shape == CYLINDER:
            part = np.where(part == 0, 2, ROUND)
        face[won] = part if item.shape != BALL else ROUND
    return _describe(scene, origin, ray, t, face, solid)


def _describe(scene: Scene, origin: Floats, ray: Floats, t: Floats, face: Ints, solid: Ints) -> Hits:
    """Points, normals and face coordinates of hits, then the paints on the room's own faces."""
    centres = np.array([s.centre for s in scene.solids] + [[s / 2 for s in scene.size]], np.float32).T
    yaws = np.array([s.yaw_rad for s in scene.solids] + [0.0], np.float32)  # index -1 is the room
    cos, sin = np.cos(yaws)[solid], np.sin(yaws)[solid]
    point = origin + t * ray
    x, y, z = point - centres[:, solid]
    own = np.stack([cos * x + sin * y, cos * y - sin * x, z])
    axis = np.arange(3)[:, None]
    inward = np.where(solid < 0, np.float32(-1), np.float32(1))
    normal = np.where(axis == face, np.sign(own) * inward, np.float32(0))
    curved = np.flatnonzero(face == ROUND)
    if curved.size:
        flat = np.array([s.shape == CYLINDER for s in scene.solids])[solid[curved]]
        away = own[:, curved] * np.stack([np.ones_like(flat), np.ones_like(flat), ~flat])
        normal[:, curved] = away / np.linalg.norm(away, axis=0)
    u = np.where(face == 0, own[1], own[0])
    v = np.where(face == 2, own[1], own[2])
    if curved.size:
        u[curved] = np.arctan2(own[1, curved], own[0, curved]) * np.hypot(own[0, curved], own[1, curved])
    normal = np.stack([cos * normal[0] - sin * normal[1], sin * normal[0] + cos * normal[1], normal[2]])
    surface = np.where(solid < 0, np.where(face == 2, np.where(z < 0, FLOOR, CEILING), WALL), solid + 3)
    for index, paint in enumerate(scene.paints):
        rest = [k for k in range(3) if k != paint.axis]
        right, up = (point[k] - np.float32(c) for k, c in zip(rest, paint.centre, strict=True))
        c, s = np.float32(np.cos(paint.turn_rad)), np.float32(np.sin(paint.turn_rad))
        across, along = c * right + s * up, c * up - s * right
        side = (own[paint.axis] > 0) == paint.high
        here = (solid < 0) & (face == paint.axis) & side
        here &= (np.abs(across) < paint.half[0]) & (np.abs(along) < paint.half[1])
        u, v = np.where(here, across, u), np.where(here, along, v)
        surface = np.where(here, 3 + len(scene.solids) + index, surface)
    return Hits(t, point, normal.astype(np.float32), surface, face, u, v, solid)


def surfaces(scene: Scene) -> tuple[list[Material], list[int]]:
    """Material and label of every surface number."""
    rest: list[Solid | Paint] = [*scene.solids, *scene.paints]
    return [*scene.materials, *(s.material for s in rest)], [*scene.labels, *(s.label for s in rest)]


def _pulse(x: Floats, width: Floats) -> Floats:
    """A square wave of period 1 whose edges are as soft as a pixel (``width``, in periods) is wide."""
    return np.clip(0.5 + (0.25 - np.abs(x - np.floor(x) - 0.5)) / width, 0, 1).astype(np.float32)


_TABLE = np.random.default_rng(7).random(1024).astype(np.float32)


def _noise(x: Floats, y: Floats) -> Floats:
    """Smooth value noise in 0..1 with one knot per unit."""
    i, j = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    a, b = x - i, y - j
    a, b = a * a * (3 - 2 * a), b * b * (3 - 2 * b)
    k = i * 73 + j * 179
    low = _TABLE[k & 1023] * (1 - a) + _TABLE[(k + 73) & 1023] * a
    high = _TABLE[(k + 179) & 1023] * (1 - a) + _TABLE[(k + 252) & 1023] * a
    return (low * (1 - b) + high * b).astype(np.float32)


def _pattern(kind: int, u: Floats, v: Floats, period: Floats, pixel: Floats) -> tuple[Floats, Floats]:
    """How much of the second colour (0..1) and which brightness a pattern has; ``pixel`` = metres that a pixel sees."""
    x, y, width = u / period, v / period, np.maximum(pixel / period, np.float32(1e-3))
    one, zero = np.ones_like(u), np.zeros_like(u)
    if kind == STRIPES:
        return _pulse(x, width), one
    if kind == CHECKER:
        p, q = _pulse(x / 2, width / 2), _pulse(y / 2, width / 2)
        return p + q - 2 * p * q, one
    if kind == DOTS:
        away = np.hypot(x - np.floor(x) - 0.5, y - np.floor(y) - 0.5)
        return np.clip(0.5 + (0.3 - away) / width, 0, 1), one
    if kind == PLANKS:
        row = np.floor(y)
        along = x / 7 + 0.37 * row
        tint = _TABLE[(np.floor(along).astype(np.int64) * 31 + row.astype(np.int64) * 17) & 1023]
        gap = np.minimum(0.5 - np.abs(y - row - 0.5), 7 * (0.5 - np.abs(along - np.floor(along) - 0.5)))
        line = np.clip(1 - gap / (0.04 + width), 0, 1) * np.minimum(1, 0.08 / width)
        return 0.75 * tint, (1 - 0.12 * _noise(x * 1.5, y * 9) / (1 + 4 * width)) * (1 - 0.45 * line)
    if kind == PLASTER:
        return zero, 0.95 + 0.05 * _noise(x, y) + 0.03 * _noise(5 * x, 5 * y) / (1 + 5 * width)
    if kind == DRAWERS:
        gap = np.minimum(0.5 - np.abs(y - np.floor(y) - 0.5), np.abs(x))
        line = np.clip(1 - gap / (0.03 + width), 0, 1) * np.minimum(1, 0.12 / width)
        knob = np.hypot(np.abs(x) - 0.28, y - np.floor(y) - 0.5)
        return zero, (1 - 0.5 * line) * (1 - 0.6 * np.clip(0.5 + (0.07 - knob) / width, 0, 1))
    return zero, one


def _to_edge(item: Solid | Paint, hits: Hits, here: Ints) -> Floats:
    """How far hits on a solid or paint are from the edge of their face."""
    across: Floats = np.full(here.shape, item.half[0], np.float32)
    along: Floats = np.full(here.shape, item.half[1], np.float32)
    if isinstance(item, Solid):
        across = np.where(hits.face[here] == 0, along, across)
        along = np.where(hits.face[here] == 2, along, np.float32(item.half[2]))
    return np.minimum(across - np.abs(hits.u[here]), along - np.abs(hits.v[here]))


def albedo(scene: Scene, hits: Hits, pixel: Floats) -> Floats:
    """Reflectance [3, N] of the hit surfaces; ``pixel [N]`` is the width in metres that a pixel covers there."""
    materials, _ = surfaces(scene)
    mains = np.array([m.main for m in materials], np.float32).T
    seconds = np.array([m.second for m in materials], np.float32).T
    periods = np.array([m.period for m in materials], np.float32)[hits.surface]
    kinds = np.array([m.pattern for m in materials])
    mix, bright = np.zeros_like(hits.t), np.ones_like(hits.t)
    for kind in np.unique(kinds[kinds != PLAIN]):
        here = np.flatnonzero(kinds[hits.surface] == kind)
        u, v = hits.u[here], hits.v[here]
        if kind in (PLASTER, STRIPES):  # runs on from the wall over whatever is painted like it
            u = np.where(hits.face[here] == 0, hits.point[1, here], hits.point[0, here])
            v = np.where(hits.face[here] == 2, hits.point[1, here], hits.point[2, here])
        mix[here], bright[here] = _pattern(int(kind), u, v, periods[here], pixel[here])
    items: list[Solid | Paint] = [*scene.solids, *scene.paints]
    for index, item in enumerate(items):
        if item.material.frame > 0:
            here = np.flatnonzero(hits.surface == 3 + index)
            rim = np.clip(0.5 + (np.float32(item.material.frame) - _to_edge(item, hits, here)) / pixel[here], 0, 1)
            mix[here] = mix[here] * (1 - rim) + rim
    return (mains[:, hits.surface] * (1 - mix) + seconds[:, hits.surface] * mix) * bright


def shadows(scene: Scene, hits: Hits) -> Floats:
    """1 where the lamp shines on a hit, 0 where a solid is in between. [N]"""
    start = hits.point + np.float32(0.02) * hits.normal
    lamp = np.array(scene.lamp, np.float32)[:, None]
    way = lamp - start
    lit = np.ones(hits.t.shape, bool)
    for solid in scene.solids:
        if solid.label == UNLABELLED or max(solid.half) < 0.1:
            continue
        near, far = _spans(solid, start, way)
        enter, leave = np.maximum.reduce(near), np.minimum.reduce(far)
        lit &= ~((enter < leave) & (leave > 0) & (enter < 1))
    return lit.astype(np.float32)


def light(scene: Scene, hits: Hits, lit: Floats) -> Floats:
    """Light that falls on the hits, without colour [N]: lamp, weak daylight, and a sky dimmed in corners."""
    way = np.array(scene.lamp, np.float32)[:, None] - hits.point
    distance = np.linalg.norm(way, axis=0)
    lamp = np.maximum((way * hits.normal).sum(0) / distance, 0) / (1 + (distance / 3) ** 2)
    day = np.maximum((np.array(scene.fill, np.float32)[:, None] * hits.normal).sum(0), 0)
    size = np.array(scene.size, np.float32)[:, None]
    gaps = np.concatenate([hits.point, size - hits.point])
    towards = np.concatenate([hits.normal, -hits.normal])  # the hit lies on the face where this is 1
    corner = np.where(towards > 0.9, np.float32(0), np.exp(-np.maximum(gaps, 0) / 0.22))
    sky = (0.46 + 0.06 * hits.normal[2]) * (1 - 0.26 * corner).prod(0)
    return (sky + 0.2 * day + 0.62 * lamp * (0.35 + 0.65 * lit)).astype(np.float32)
