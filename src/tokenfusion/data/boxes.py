"""Oriented boxes: the one place of their conventions, and what becomes of them when a scene moves.

A box is seven numbers: centre x y z, full sizes l w h in metres, yaw in radians counter-clockwise seen from above (x right,
y ahead, z up). l lies along the yaw direction: corner = centre + Rz(yaw) (+-l/2, +-w/2, +-h/2).
VoteNet and Group-Free write heading = -yaw, and VoteNet's files half sizes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

RING = ((1, 1), (-1, 1), (-1, -1), (1, -1))  # signs of l and w
SIGNS = tuple((*side, up) for up in (-1, 1) for side in RING)  # of the eight corners
EDGES = tuple(
    edge for k in range(4) for edge in ((k, (k + 1) % 4), (k + 4, (k + 1) % 4 + 4), (k, k + 4))
)  # pairs of corners
NEAR_M = 0.05  # what lies nearer to the camera's plane, or behind it, is not seen
FAR_M = 1e6  # what a file places farther from the origin than this is no scene in metres
BLOCK = 2**20  # pairs of points and boxes that are looked at together


def wrap_angle(angle: Tensor) -> Tensor:
    """The same angle in [-pi, pi); one that lies there already keeps every bit."""
    return angle - 2 * math.pi * torch.floor((angle + math.pi) / (2 * math.pi))


def corners(boxes: Tensor) -> Tensor:
    """The eight corners: [..., 7] -> [..., 8, 3].

    Seen from above counter-clockwise, beginning with the one at +l, +w: first the four below, then the four above.
    """
    local = boxes.new_tensor(SIGNS) * boxes[..., None, 3:6] / 2
    cos, sin = boxes[..., 6, None].cos(), boxes[..., 6, None].sin()
    along, across, up = local.unbind(-1)
    turned = torch.stack([cos * along - sin * across, sin * along + cos * across, up], -1)
    return boxes[..., None, :3] + turned


def contains(points: Tensor, boxes: Tensor) -> Tensor:
    """Which point lies in which box, its faces included: points [N, 3], boxes [K, 7] -> bool [N, K].

    Memory beside the result is bounded whatever N is.
    """
    cos, sin = boxes[:, 6].cos(), boxes[:, 6].sin()
    half = boxes[:, 3:6] / 2

    def inside(block: Tensor) -> Tensor:
        x, y, z = (block[:, axis, None] - boxes[:, axis] for axis in range(3))
        along, across = cos * x + sin * y, cos * y - sin * x
        return (along.abs() <= half[:, 0]) & (across.abs() <= half[:, 1]) & (z.abs() <= half[:, 2])

    return torch.cat([inside(block) for block in points.split(max(BLOCK // max(len(boxes), 1), 1))])


def axis_aligned_extent(boxes: Tensor) -> Tensor:
    """Sizes of the axis-aligned hull around the same centre: [..., 7] -> [..., 3]."""
    length, width, height = boxes[..., 3:6].abs().unbind(-1)
    cos, sin = boxes[..., 6].cos().abs(), boxes[..., 6].sin().abs()
    return torch.stack([length * cos + width * sin, length * sin + width * cos, height], -1)


def axis_aligned(boxes: Tensor) -> Tensor:
    """The axis-aligned hull as a box with yaw 0: what ScanNet's boxes become when a scene is turned. [..., 7]"""
    return torch.cat([boxes[..., :3], axis_aligned_extent(boxes), torch.zeros_like(boxes[..., 6:])], -1)


def with_hull_sizes(boxes: Tensor) -> Tensor:
    """The true boxes as Group-Free's SUN RGB-D recipe takes them: sizes of the axis-aligned hull, and yet the yaw. [..., 7]

    Figures made against these boxes can only be compared with its own and those of code built upon it.
    """
    return torch.cat([boxes[..., :3], axis_aligned_extent(boxes), boxes[..., 6:]], -1)


# ---- other conventions -------------------------------------------------------------------------------------------


def from_groupfree(boxes: Tensor) -> Tensor:
    """Full sizes and heading = -yaw, as inside Group-Free, to ours; it is its own inverse. [..., 7]"""
    return torch.cat([boxes[..., :6], -boxes[..., 6:]], -1)


def from_votenet(boxes: Tensor) -> Tensor:
    """VoteNet's files (centre, half sizes, heading = -yaw) to ours. [..., 7]"""
    return torch.cat([boxes[..., :3], 2 * boxes[..., 3:6], -boxes[..., 6:]], -1)


def to_votenet(boxes: Tensor) -> Tensor:
    """The inverse of :func:`from_votenet`. [..., 7]"""
    return torch.cat([boxes[..., :3], boxes[..., 3:6] / 2, -boxes[..., 6:]], -1)


def from_votenet_label(values: Tensor) -> Tensor:
    """SUN RGB-D's own numbers to ours: [..., 8] -> [..., 7].

    Args:
        values: centre x y z, half sizes in the order w l h (the ``coeffs``, without their sign), and the direction x y of
            l: the last eight numbers of a line of VoteNet's ``label_v1``.
    """
    width, length, height = (2 * values[..., 3:6].abs()).unbind(-1)
    yaw = torch.atan2(values[..., 7], values[..., 6])
    return torch.cat([values[..., :3], torch.stack([length, width, height, yaw], -1)], -1)


# ---- motion ------------------------------------------------------------------------------------------------------


def flip_x(boxes: Tensor) -> Tensor:
    """Mirror left and right: x -> -x. [..., 7]"""
    centre = boxes[..., :3] * boxes.new_tensor([-1, 1, 1])
    return torch.cat([centre, boxes[..., 3:6], wrap_angle(math.pi - boxes[..., 6:])], -1)


def flip_y(boxes: Tensor) -> Tensor:
    """Mirror near and far: y -> -y. [..., 7]"""
    centre = boxes[..., :3] * boxes.new_tensor([1, -1, 1])
    return torch.cat([centre, boxes[..., 3:6], wrap_angle(-boxes[..., 6:])], -1)


def rotate_z(boxes: Tensor, angle: float) -> Tensor:
    """Turn the scene by ``angle`` radians, counter-clockwise seen from above. [..., 7]"""
    cos, sin = math.cos(angle), math.sin(angle)
    x, y, z = boxes[..., :3].unbind(-1)
    centre = torch.stack([cos * x - sin * y, sin * x + cos * y, z], -1)
    return torch.cat([centre, boxes[..., 3:6], wrap_angle(boxes[..., 6:] + angle)], -1)


def scale(boxes: Tensor, factor: float) -> Tensor:
    """Enlarge the scene around its origin. [..., 7]"""
    return torch.cat([boxes[..., :6] * factor, boxes[..., 6:]], -1)


# ---- images ------------------------------------------------------------------------------------------------------


def project_boxes(boxes: Tensor, projection: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The smallest rectangles around the projected boxes, cut at the image's border.

    Edges that reach behind the camera are cut 5 cm in front of it.

    Args:
        boxes: [K, 7].
        projection: [3, 4], (u z, v z, z) = P (x, y, z, 1); pixels count from 0 at the centre of the first one. With a
            matrix of zeros, a missing view, nothing is visible.
        size: rows and columns of the image; its border lies at -0.5 and columns - 0.5, rows - 0.5.

    Returns:
        x1 y1 x2 y2 in pixels ``[K, 4]`` and whether any of it lies in the image, bool ``[K]``; zeros where nothing does.
    """
    shown = corners(boxes) @ projection[:, :3].T + projection[:, 3]  # [K, 8, 3]
    start, end = (shown[:, [edge[side] for edge in EDGES]] for side in (0, 1))
    gap = end[..., 2] - start[..., 2]
    part = ((NEAR_M - start[..., 2]) / torch.where(gap == 0, 1, gap)).clamp(0, 1)[..., None]
    candidates = torch.cat([shown, start + part * (end - start)], 1)  # corners, and where edges meet the near plane
    depth = candidates[..., 2:]
    ahead = depth >= NEAR_M * (1 - 1e-3)  # the cut itself counts in spite of rounding
    pixel = candidates[..., :2] / torch.where(ahead, depth, 1)
    limit = pixel.new_tensor([size[1] - 0.5, size[0] - 0.5])
    low = torch.where(ahead, pixel, math.inf).amin(1).clamp(min=-0.5)
    high = torch.where(ahead, pixel, -math.inf).amax(1).minimum(limit)
    visible = (low < high).all(-1)
    return torch.where(visible[:, None], torch.cat([low, high], -1), 0), visible
