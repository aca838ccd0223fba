"""PointNet++ (Qi et al., 2017) as VoteNet and Group-Free-3D use it: a cloud becomes 1024 seeds with features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenfusion.backbones.pointops import (
    ball_query,
    distances,
    furthest_point_sample,
    gather,
    interpolate,
    three_nn,
)

SEED_DIM = 288
SMALLEST_WIDTH = 1 / 64  # PointNet++ begins with 64 channels at width 1


class Levels(NamedTuple):
    """The four levels of abstraction; each keeps a number of points and pools a ball around each of them."""

    points: tuple[int, ...] = (2048, 1024, 512, 256)
    radii: tuple[float, ...] = (0.2, 0.4, 0.8, 1.2)  # metres
    samples: tuple[int, ...] = (64, 32, 16, 16)  # points per ball


PUBLISHED = Levels()


class PointIndices(NamedTuple):
    """All that the network must search for in a cloud; int32, from coordinates alone.

    Shapes: ``[S_1]``, ``[S_l, samples_l]`` into the level before, ``[S_3, 3]`` into level 4, ``[S_2, 3]`` into level 3; after
    the batch's dimension where there is one.
    """

    sample: Tensor  # points of the first level in the cloud; the later levels are its beginning
    group1: Tensor
    group2: Tensor
    group3: Tensor
    group4: Tensor
    up3: Tensor
    up2: Tensor


class Seeds(NamedTuple):
    """The points that stand for a cloud."""

    xyz: Tensor  # [B, S, 3] metres
    features: Tensor  # [B, S, 288]
    index: Tensor  # type: ignore[assignment]  # int64 [B, S] into the cloud; tuples have a method of that name


def point_indices(xyz: Tensor, levels: Levels = PUBLISHED) -> PointIndices:
    """Search one cloud ``[N, 3]`` or a batch ``[B, N, 3]``; meant for the workers that read data as well as for the device.

    Furthest points of a list in that order are its beginning: one search serves all levels.
    """
    cloud = xyz if xyz.dim() == 3 else xyz[None]
    sample = furthest_point_sample(cloud, levels.points[0])
    level = gather(cloud, sample)
    found, before = [sample], cloud
    for count, radius, size in zip(*levels, strict=True):
        found.append(ball_query(before, level[:, :count], radius, size))
        before = level[:, :count]
    for fine, coarse in ((2, 3), (1, 2)):
        found.append(three_nn(level[:, : levels.points[fine]], level[:, : levels.points[coarse]])[1])
    return PointIndices(*(index.int() if xyz.dim() == 3 else index[0].int() for index in found))


class Pointwise(nn.Module):
    """A linear layer on the last dimension, batch norm, ReLU: what a 1x1 convolution is to points."""

    def __init__(self, inputs: int, outputs: int, bias: bool, momentum: float) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias)
        self.norm = nn.BatchNorm1d(outputs, momentum=momentum)

    def activate(self, x: Tensor) -> Tensor:
        """What follows the linear layer."""
        return F.relu(self.norm(x.flatten(0, -2)), inplace=True).view_as(x)  # in place on no view: autograd would copy

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(self.linear(x))


class Abstraction(nn.Module):
    """Set abstraction: every ball's points, relative to its centre, through a shared MLP, then their maximum."""

    def __init__(self, channels: int, widths: Sequence[int], radius: float, momentum: float) -> None:
        super().__init__()
        self.radius = radius
        inputs = (3 + channels, *widths)
        self.layers = nn.ModuleList(Pointwise(a, b, False, momentum) for a, b in pairwise(inputs))

    def forward(self, xyz: Tensor, features: Tensor | None, centers: Tensor, group: Tensor) -> Tensor:
        """``xyz [B, N, 3]``, ``features [B, N, C]``, ``centers [B, S, 3]``, ``group [B, S, K]`` -> ``[B, S, widths[-1]]``."""
        local = (gather(xyz, group) - centers[:, :, None]) / self.radius
        first, *rest = cast("list[Pointwise]", list(self.layers))
        weight = first.linear.weight
        x = F.linear(local, weight[:, :3])
        if features is not None:  # a linear layer commutes with gathering: N columns to multiply instead of S * K
            x = x + gather(F.linear(features, weight[:, 3:]), group)
        x = first.activate(x)
        for layer in rest:
            x = layer(x)
        return x.max(2).values if x.requires_grad else x.amax(2)  # each is three times as fast as the other there


class Propagation(nn.Module):
    """Feature propagation: a coarse level's features, interpolated, join a fine one's in a shared MLP."""

    def __init__(self, channels: int, widths: Sequence[int], momentum: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Pointwise(a, b, False, momentum) for a, b in pairwise((channels, *widths))))

    def forward(self, fine: Tensor, skip: Tensor, coarse: Tensor, features: Tensor, index: Tensor) -> Tensor:
        """``skip [B, U, C]`` at ``fine [B, U, 3]``, ``features [B, K, D]`` at ``coarse [B, K, 3]`` -> ``[B, U, widths[-1]]``.

        ``index [B, U, 3]`` names the coarse neighbours of the fine points.
        """
        spread = interpolate(features, distances(fine, coarse, index), index)
        return self.layers(torch.cat([spread, skip], -1))


def check_counts(**given: Sequence[int]) -> None:
    """Raise a ValueError where something is not counted in whole numbers above 0."""
    for name, counts in given.items():
        if any(not isinstance(count, int) or count < 1 for count in counts):
            raise ValueError(f"{name}: wanted whole numbers above 0, not {', '.join(map(str, counts))}")


def _check_measures(width: float, radii: Sequence[float], momentum: float) -> None:
    if not SMALLEST_WIDTH <= width < math.inf:
        raise ValueError(f"width: wanted at least {SMALLEST_WIDTH:g}, a channel per layer, not {width}")
    if any(not 0 < radius < math.inf for radius in radii):
        raise ValueError(f"radii: wanted metres above 0, not {list(radii)}")
    if not 0 < momentum <= 1:
        raise ValueError(f"momentum: wanted above 0 and at most 1, not {momentum}")


class PointNet2(nn.Module):
    """Four set abstractions, two feature propagations. The seeds are the second level's points.

    Shape: cloud ``[B, N, channels]`` (xyz in metres first) -> :class:`Seeds`.

    Args:
        channels: of the cloud: 3 and what each point has beside its coordinates.
        width: factor of all widths but that of the seeds.
        points, radii, samples: of the four levels, see :class:`Levels`.
        momentum: of the batch norms.

    Raises:
        ValueError: where there are not four levels, a level has more points than the one before, or a number is none of
            its kind.
    """

    def __init__(
        self,
        channels: int = 3,
        width: float = 1,
        points: Sequence[int] = PUBLISHED.points,
        radii: Sequence[float] = PUBLISHED.radii,
        samples: Sequence[int] = PUBLISHED.samples,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        check_counts(points=points, samples=samples)
        _check_measures(width, radii, momentum)
        self.channels = channels
        self.levels = Levels(tuple(points), tuple(radii), tuple(samples))
        if any(len(of) != 4 for of in self.levels) or list(self.levels.points) != sorted(self.levels.points)[::-1]:
            raise ValueError(f"levels: wanted 4 of each and no more points than the level before, not {self.levels}")
        if channels < 3:
            raise ValueError(f"a cloud has at least the 3 coordinates, not {channels} channels")
        small, middle, large = (round(width * c) for c in (64, 128, 256))
        widths = [(small, small, middle)] + [(middle, middle, large)] * 3
        inputs = (channels - 3, middle, large, large)
        self.down = nn.ModuleList(
            Abstraction(c, w, radius, momentum) for c, w, radius in zip(inputs, widths, self.levels.radii, strict=True)
        )
        self.up = nn.ModuleList(Propagation(2 * large, (large, last), momentum) for last in (large, SEED_DIM))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, points: Tensor, indices: PointIndices | None = None) -> Seeds:
        """Seeds of a batch; ``indices`` of :func:`point_indices` with these levels, where they were computed ahead."""
        if points.shape[-1] != self.channels:
            raise ValueError(f"the cloud has {points.shape[-1]} channels, this network takes {self.channels}")
        xyz, features = points[..., :3], points[..., 3:] if points.shape[-1] > 3 else None
        found = point_indices(xyz, self.levels) if indices is None else indices
        level = gather(xyz, found.sample)
        stages: list[Tensor] = []
        for stage, count, group in zip(self.down, self.levels.points, found[1:5], strict=True):
            centers = level[:, :count]
            features = stage(xyz, features, centers, group)
            stages.append(features)
            xyz = centers
        second, third, fourth = (level[:, :count] for count in self.levels.points[1:])
        features = self.up[0](third, stages[2], fourth, stages[3], found.up3)
        features = self.up[1](second, stages[1], third, features, found.up2)
        return Seeds(second, features, found.sample[:, : second.shape[1]].long())
