"""The searches of :mod:`tokenfusion.backbones.pointops` in plain torch: for devices that neither numba nor Triton serves.

The same indices on every device that has double precision; where it is missing, distances are rounded once more, which can
decide between points that are equally far to the last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

FAR = 1e10  # squared metres, before anything was chosen
HOLE = 1e-3  # squared metres: points this near to the origin are skipped
PAIRS = 2**24  # distances that are in memory together


def furthest_point_sample(xyz: Tensor, count: int, order: Tensor) -> Tensor:
    """``xyz [B, N, 3]`` -> int64 ``[B, count]``; ``order`` int64 ``[N]`` decides ties."""
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    size = _square(xyz).to(_wide(xyz))  # 1e-3 is no float32: a single would be compared with what it rounds to
    nearest = torch.where((size > HOLE) & size.isfinite(), FAR, -1.0).to(xyz.dtype)
    rows = torch.arange(len(xyz), device=xyz.device)
    chosen = torch.zeros(len(xyz), count, dtype=torch.int64, device=xyz.device)
    for i in range(1, count):
        last = xyz[rows, chosen[:, i - 1]].unsqueeze(1)
        distance = _square(xyz - last)
        nearest = torch.where(distance < nearest, distance, nearest)
        best = nearest.amax(1, keepdim=True)
        first = torch.where(nearest == best, rank, len(order)).argmin(1)
        chosen[:, i] = torch.where(best[:, 0] < 0, 0, first)  # where nothing may be chosen it is point 0
    return chosen


def ball_query(xyz: Tensor, centers: Tensor, radius: float, count: int) -> Tensor:
    """``xyz [B, N, 3]``, ``centers [B, M, 3]`` -> int64 ``[B, M, count]``."""
    points = xyz.shape[1]
    limit = torch.tensor(radius, dtype=torch.float32).square().to(xyz.device)
    number = torch.arange(points, device=xyz.device)
    found = []
    for some in centers.split(max(1, PAIRS // (points * len(xyz))), 1):
        inside = _square(some.unsqueeze(2) - xyz.unsqueeze(1)) < limit
        hits = torch.where(inside, number, points).topk(min(count, points), largest=False).values
        first = torch.where(hits[..., :1] < points, hits[..., :1], 0)
        hits = torch.where(hits < points, hits, first)
        found.append(torch.cat([hits, first.expand(*first.shape[:2], count - hits.shape[-1])], -1))
    return torch.cat(found, 1)


def three_nn(unknown: Tensor, known: Tensor) -> Tensor:
    """``unknown [B, U, 3]``, ``known [B, K, 3]`` -> int64 ``[B, U, 3]``, nearest first."""
    nearest = []
    for some in unknown.split(max(1, PAIRS // (known.shape[1] * len(known))), 1):
        distance = _square(some.unsqueeze(2) - known.unsqueeze(1)).nan_to_num(nan=torch.inf, posinf=torch.inf)
        values, index = distance.sort(dim=-1, stable=True)
        index = torch.where(values < torch.inf, index, 0)[..., :3]  # what is no number is nobody's neighbour
        missing = 3 - index.shape[-1]
        nearest.append(torch.cat([index, index.new_zeros(*index.shape[:2], missing)], -1))
    return torch.cat(nearest, 1)


def _square(x: Tensor) -> Tensor:
    """Squared length of ``[..., 3]`` in the order in which the reference rounds: ``fma(z, z, fma(x, x, y * y))``."""
    wide = _wide(x)
    first, second, third = x.unbind(-1)
    total = second * second
    for part in (first, third):
        part = part.to(wide)
        total = (part * part + total).to(x.dtype)
    return total


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64
