"""Random motions of a scene: points, boxes and projections move together, images stay as they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tokenfusion.data import boxes as box
from tokenfusion.errors import UserError


class Motion(NamedTuple):
    """Mirrored first, then turned (counter-clockwise seen from above), then scaled, around the origin."""

    flip_x: bool = False
    flip_y: bool = False
    angle_rad: float = 0.0
    scale: float = 1.0

    def matrix(self) -> Tensor:
        """float64 [3, 3]: a point p goes to M p."""
        cos, sin = math.cos(self.angle_rad), math.sin(self.angle_rad)
        turn = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
        mirror = torch.tensor([-1.0 if self.flip_x else 1.0, -1.0 if self.flip_y else 1.0, 1.0], dtype=torch.float64)
        return self.scale * turn * mirror


@dataclass(frozen=True)
class SceneAugment:
    """Random mirror images, turns and scales of a scene, each drawn evenly.

    Args:
        flip_x: probability that left and right change places.
        flip_y: probability that near and far change places.
        rotation_deg: largest turn about the vertical, to either side.
        scale: range of the factor.
        aligned_boxes: boxes have no yaw (ScanNet): a turned one becomes its axis-aligned hull.
    """

    flip_x: float = 0.5
    flip_y: float = 0.0
    rotation_deg: float = 30.0
    scale: tuple[float, float] = (0.85, 1.15)
    aligned_boxes: bool = False

    def __post_init__(self) -> None:
        if not (0 <= self.flip_x <= 1 and 0 <= self.flip_y <= 1):
            raise UserError(f"data.flip_x {self.flip_x} and data.flip_y {self.flip_y} must lie in 0..1")
        if not 0 <= self.rotation_deg <= 180:
            raise UserError(f"data.rotation_deg is {self.rotation_deg}; wanted 0..180")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] < math.inf:
            raise UserError(f"data.scale is {list(self.scale)}; wanted [low, high] with 0 < low <= high")

    def draw(self, generator: torch.Generator) -> Motion:
        """The motion of one scene; always as many draws, so that none moves the next one."""
        draws = torch.rand(4, generator=generator).tolist()
        angle = math.radians(self.rotation_deg) * (2 * draws[2] - 1)
        scale = self.scale[0] + (self.scale[1] - self.scale[0]) * draws[3]
        return Motion(draws[0] < self.flip_x, draws[1] < self.flip_y, angle, scale)


def move_points(points: Tensor, motion: Motion) -> Tensor:
    """[P, 3 + C] -> the same shape; what stands beside x y z stays."""
    return torch.cat([points[:, :3] @ motion.matrix().to(points.dtype).T, points[:, 3:]], 1)


def move_boxes(boxes: Tensor, motion: Motion, aligned: bool = False) -> Tensor:
    """Boxes [K, 7] move as their points do; with ``aligned`` they become axis-aligned hulls."""
    boxes = box.flip_x(boxes) if motion.flip_x else boxes
    boxes = box.flip_y(boxes) if motion.flip_y else boxes
    boxes = box.scale(box.rotate_z(boxes, motion.angle_rad), motion.scale)
    return box.axis_aligned(boxes) if aligned else boxes


def move_projection(projection: Tensor, motion: Motion) -> Tensor:
    """P [..., 3, 4] -> P' with P' (M p, 1) = P (p, 1): a point that has moved is still seen in the same pixel."""
    back = torch.linalg.inv(motion.matrix()).to(projection.dtype)
    return torch.cat([projection[..., :3] @ back, projection[..., 3:]], -1)


def recolour(rgb: Tensor, generator: torch.Generator) -> Tensor:
    """Colours [P, 3] in 0..1 of points under another light: gain up to 20 % and shift up to 0.05 per channel, up to 0.025
    per point, and three of ten points lose theirs (0 0 0). Source: Group-Free's SUN RGB-D recipe.
    """
    gain, shift = torch.rand(2, 3, generator=generator)
    noise, keep = torch.rand(2, len(rgb), 1, generator=generator)
    changed = rgb * (0.8 + 0.4 * gain) + 0.1 * (shift - 0.5) + 0.05 * (noise - 0.5)
    return changed.clamp(0, 1) * (keep > 0.3)
