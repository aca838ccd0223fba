"""Procedural furnished rooms: every modality that the tasks use, aligned to the pixel, from a seed alone.

The modalities complement each other on purpose. Colour alone tells picture, cupboard and carpet from wall and floor and
a dresser from a locker; shape alone tells panel, box, sofa and table, which are painted like the wall or the floor; a
vivid thing on the floor is a carpet where flat and a cushion where raised; and on the walls vividness, hue and relief
decide together: flat and warm or raised and cool is a picture (poster, canvas on a deep frame), flat and cool or raised
and warm a cupboard (built in, mounted). Some frames are dark or overexposed, in others depth misses large patches.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenfusion.data import raycast as rc
from tokenfusion.data.furniture import Camera, Furnisher
from tokenfusion.data.raycast import Floats, Scene

DARK, GOOD, GLARING = (0.02, 0.06), (0.85, 1.15), (3.5, 6.0)  # ranges of exposure


class Room(NamedTuple):
    """One frame. Upright axes: x right, y ahead, z up, origin on the floor below the camera, metres."""

    rgb: NDArray[np.uint8]  # [H, W, 3] as a sensor sees it: exposure, noise
    depth_m: Floats  # [H, W] along the optical axis, with noise; 0 = hole
    true_depth_m: Floats  # [H, W] without noise and holes
    normal: Floats  # [H, W, 3] unit, camera axes (x right, y down, z forward), towards the camera (z < 0 ahead)
    shade: Floats  # [H, W] 0..1, the light that falls on the surface
    texture_edge: Floats  # [H, W] 0..1, steps of the reflectance
    occlusion_edge: Floats  # [H, W] 0..1, steps of the depth
    label: NDArray[np.uint8]  # [H, W] index into CLASSES; 255 = lamps and plants, which have no class
    instance: NDArray[np.uint8]  # [H, W] row in boxes + 1; 0 = none
    points_xyzrgb: Floats  # [P, 6] upright metres and colour 0..1, one per pixel whose depth is known
    boxes: Floats  # [n, 7] centre, full sizes, yaw (counter-clockwise seen from above, radians), upright
    box_class: NDArray[np.int64]  # [n] index into CLASSES
    K: Floats  # [3, 3]; pixel (column, row) counts from 0 at the centre of the first pixel
    pose: Floats  # [4, 4] camera axes to upright axes


def _steps(image: Floats) -> Floats:
    """Largest difference to the next pixel on each side, per pixel. [H, W, C] -> [H, W]"""
    out = np.zeros(image.shape[:2], np.float32)
    for axis in (0, 1):
        step = np.abs(np.diff(image, axis=axis)).max(-1)
        ahead, behind = [(0, 0), (0, 0)], [(0, 0), (0, 0)]
        ahead[axis], behind[axis] = (0, 1), (1, 0)
        out = np.maximum(out, np.maximum(np.pad(step, ahead), np.pad(step, behind)))
    return out


def _bends(image: Floats) -> Floats:
    """Second differences: zero on planes where ``image`` is one over depth. [H, W] -> [H, W]"""
    out = np.zeros_like(image)
    out[1:-1] = np.abs(image[2:] - 2 * image[1:-1] + image[:-2])
    out[:, 1:-1] = np.maximum(out[:, 1:-1], np.abs(image[:, 2:] - 2 * image[:, 1:-1] + image[:, :-2]))
    return out


def _soften(image: Floats, radius: int) -> Floats:
    """Mean over a square window that ends at the border. [H, W] -> [H, W]"""
    for axis in (0, 1):
        pad = [(0, 0), (0, 0)]
        pad[axis] = (radius + 1, radius)
        total = np.cumsum(np.pad(image, pad, mode="edge"), axis=axis, dtype=np.float64)
        n = image.shape[axis]
        window = 2 * radius + 1
        high, low = np.take(total, range(window, window + n), axis), np.take(total, range(n), axis)
        image = ((high - low) / window).astype(np.float32)
    return image


def _expose(light: Floats, exposure: tuple[float, float], rng: np.random.Generator) -> NDArray[np.uint8]:
    """A camera: exposure (a range of factors, 1 = right), white balance, noise, gamma."""
    factor = float(rng.uniform(*exposure))
    balance = (1 + rng.uniform(-0.06, 0.06, 3)).astype(np.float32)
    signal = light * np.float32(factor / (2.4 * light.mean())) * balance
    grain = rng.standard_normal(signal.shape, np.float32)
    signal = signal + grain * np.sqrt(1.5e-4 * np.maximum(signal, 0) + 5e-5)
    return (255 * np.clip(signal, 0, 1) ** np.float32(1 / 2.2) + 0.5).astype(np.uint8)


def _measure(
    depth: Floats, slant: Floats, edge: Floats, instance: NDArray[np.uint8], patchy: bool, rng: np.random.Generator
) -> Floats:
    """A depth sensor: noise grows with distance squared; holes at edges, at grazing angles and, if patchy, at large."""
    height, width = depth.shape
    noisy = depth + rng.standard_normal(depth.shape, np.float32) * (0.0015 + 0.0018 * depth * depth)
    hole = rng.random(depth.shape, np.float32) < 0.003 + 0.5 * (edge > 0.3) + 0.4 * (slant < 0.12)
    hole |= depth > 6.5
    if patchy:
        rows, columns = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
        for _ in range(int(rng.integers(2, 5))):
            (a, b), (p, q) = rng.random(2), rng.uniform(0.12, 0.3, 2)
            ripple = 0.25 * np.sin(9 * rows + 7 * columns + 6 * a)
            hole |= ((rows - a) / p) ** 2 + ((columns - b) / q) ** 2 < 1 + ripple
        for index in range(1, int(instance.max()) + 1):  # things that swallow the sensor's light
            if rng.random() < 0.35:
                hole |= instance == index
    return np.where(hole, np.float32(0), noisy).astype(np.float32)


def render(seed: int, height: int, width: int) -> Room:
    """Draw the room of a seed; a pure function of its arguments. The scene does not depend on the size.

    Args:
        seed: a non-negative number; every number is another room, camera and sensor.
        height, width: pixels; the field of view is that of 4:3 and is cut or widened for other shapes.
    """
    builder = Furnisher(np.random.default_rng([seed, 0]))
    scene, camera = builder.scene(), builder.camera
    sensor = np.random.default_rng([seed, 1])
    focal = max(width, height * 4 / 3) / (2 * camera.half_width)
    K = np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]], np.float32)
    rows, columns = np.divmod(np.arange(height * width, dtype=np.int64), width)
    screen = (np.stack([columns - K[0, 2], rows - K[1, 2]]) / np.float32(focal)).astype(np.float32)

    hits = rc.cast(scene, camera.centre, camera.axes, screen)
    lit = _soften(rc.shadows(scene, hits).reshape(height, width), max(1, height // 64)).ravel()
    light = rc.light(scene, hits, lit)
    slant = _slant(hits, camera)
    paint = rc.albedo(scene, hits, hits.t / (np.float32(focal) * np.maximum(slant, 0.2)))
    radiance = paint * light
    _refine(radiance, scene, camera, screen, hits, lit, focal, (height, width))

    shape = (height, width)
    labels = np.array(rc.surfaces(scene)[1], np.uint8)[hits.surface].reshape(shape)
    owner = np.array([*(s.instance for s in scene.solids), 0])[hits.solid]
    shown = [k for k, n in enumerate(np.bincount(owner, minlength=len(builder.boxes) + 1)[1:]) if n * 800 >= owner.size]
    rename = np.zeros(len(builder.boxes) + 1, np.uint8)
    rename[[k + 1 for k in shown]] = np.arange(1, len(shown) + 1)
    instance = rename[owner].reshape(shape)

    depth = hits.t.reshape(shape)
    edge = np.clip((_bends(1 / depth) * depth - 0.03) / 0.15, 0, 1)
    mishap = sensor.random()  # at most one sensor fails in a frame, so that the other can stand in
    exposure = DARK if mishap < 0.15 else GLARING if mishap < 0.25 else GOOD
    rgb = _expose(radiance.T.reshape(*shape, 3), exposure, sensor)
    depth_m = _measure(depth, slant.reshape(shape), edge, instance, mishap > 0.75, sensor)
    pose = _pose(camera)
    return Room(
        rgb=rgb,
        depth_m=depth_m,
        true_depth_m=depth,
        normal=(camera.axes @ hits.normal).T.reshape(*shape, 3),
        shade=np.clip(light / 1.3, 0, 1).reshape(shape),
        texture_edge=np.clip(_steps(paint.T.reshape(*shape, 3)) / 0.5, 0, 1),
        occlusion_edge=edge,
        label=labels,
        instance=instance,
        points_xyzrgb=_points(depth_m, rgb, screen, pose),
        boxes=_boxes([builder.boxes[k] for k in shown], camera),
        box_class=np.array([builder.box_class[k] for k in shown], np.int64),
        K=K,
        pose=pose,
    )


def _slant(hits: rc.Hits, camera: Camera) -> Floats:
    """Cosine between view and normal. [N]"""
    way = hits.point - camera.centre
    return np.abs((way * hits.normal).sum(0)) / np.linalg.norm(way, axis=0)


def _refine(
    radiance: Floats,
    scene: Scene,
    camera: Camera,
    screen: Floats,
    hits: rc.Hits,
    lit: Floats,
    focal: float,
    shape: tuple[int, int],
) -> None:
    """Redraw pixels at borders between surfaces with four rays each. Changes ``radiance [3, N]`` in place."""
    border = _steps((hits.surface * 4 + hits.face).reshape(*shape, 1).astype(np.float32)).ravel() > 0
    pixels = np.flatnonzero(border)
    shift = np.array([[-1, 1, -1, 1], [-1, -1, 1, 1]], np.float32)[:, None] / np.float32(4 * focal)
    rays = (screen[:, pixels, None] + shift).reshape(2, -1)
    fine = rc.cast(scene, camera.centre, camera.axes, rays)
    footprint = fine.t / (np.float32(2 * focal) * np.maximum(_slant(fine, camera), 0.2))
    colour = rc.albedo(scene, fine, footprint) * rc.light(scene, fine, np.repeat(lit[pixels], 4))
    radiance[:, pixels] = np.minimum(colour, 2).reshape(3, -1, 4).mean(-1)


def _turn(camera: Camera) -> Floats:
    """The room's axes to upright ones [3, 3]: ahead of the camera becomes y."""
    angle = np.pi / 2 - camera.heading_rad
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]], np.float32)


def _pose(camera: Camera) -> Floats:
    pose = np.eye(4, dtype=np.float32)
    pose[:3, :3] = _turn(camera) @ camera.axes.T
    pose[2, 3] = camera.centre[2, 0]
    return pose


def _boxes(boxes: list[tuple[float, ...]], camera: Camera) -> Floats:
    """Boxes from the room's axes to upright ones. [n, 7]"""
    out = np.array(boxes, np.float32).reshape(-1, 7)
    ground = camera.centre[:, 0] * np.array([1, 1, 0], np.float32)
    out[:, :3] = (out[:, :3] - ground) @ _turn(camera).T
    yaw = out[:, 6] + np.float32(np.pi / 2 - camera.heading_rad)
    out[:, 6] = (yaw + np.pi) % (2 * np.pi) - np.pi
    return out


def _points(depth_m: Floats, rgb: NDArray[np.uint8], screen: Floats, pose: Floats) -> Floats:
    """What depth and colour together show, in upright axes. [P, 6]"""
    flat = depth_m.ravel()
    known = flat > 0
    seen = np.concatenate([screen[:, known], np.ones((1, int(known.sum())), np.float32)]) * flat[known]
    xyz = pose[:3, :3] @ seen + pose[:3, 3:]
    return np.concatenate([xyz.T, rgb.reshape(-1, 3)[known] / np.float32(255)], axis=1).astype(np.float32)
