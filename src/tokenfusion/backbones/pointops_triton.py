"""The searches of :mod:`tokenfusion.backbones.pointops` on a GPU: Triton kernels, which need no compiler beside torch's own.

Nothing here waits for the device.
"""

from __future__ import annotations

import numpy as np
import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

CHUNK = 2048  # points that one step of the furthest point search looks at
ROWS, COLUMNS = 32, 128  # centres and points of one step of the ball query
POINTS = 128  # that look for their neighbours together


@triton.jit
def _square(dx: tl.tensor, dy: tl.tensor, dz: tl.tensor) -> tl.tensor:
    """Squared length in the order in which the reference rounds."""
    return tl.fma(dz, dz, tl.fma(dx, dx, dy * dy))


@triton.jit
def _furthest(
    x: tl.tensor,
    y: tl.tensor,
    z: tl.tensor,
    nearest: tl.tensor,
    chosen: tl.tensor,
    points: tl.tensor,
    count: tl.tensor,
    CHUNK: tl.constexpr,
) -> None:
    cloud = tl.program_id(0)
    x += cloud * points
    y += cloud * points
    z += cloud * points
    nearest += cloud * points
    chosen += cloud * count
    lane = tl.arange(0, CHUNK)
    last = tl.full([], 0, tl.int32)
    tl.store(chosen, last)
    for i in range(1, count):
        px, py, pz = tl.load(x + last), tl.load(y + last), tl.load(z + last)
        best = tl.full([CHUNK], -1.0, tl.float32)
        at = tl.full([CHUNK], 0, tl.int32)
        for start in range(0, points, CHUNK):
            k = start + lane
            inside = k < points
            dx = tl.load(x + k, mask=inside, other=0.0) - px
            dy = tl.load(y + k, mask=inside, other=0.0) - py
            dz = tl.load(z + k, mask=inside, other=0.0) - pz
            before = tl.load(nearest + k, mask=inside, other=-1.0)
            distance = _square(dx, dy, dz)
            now = tl.where(distance < before, distance, before)  # skipped points stay at -1, and so never are further
            tl.store(nearest + k, now, mask=inside)
            at = tl.where(now > best, k, at)
            best = tl.where(now > best, now, best)
        top = tl.max(best, axis=0)
        last = tl.min(tl.where(best == top, at, points), axis=0)
        tl.store(chosen + i, last)


def furthest_point_sample(xyz: Tensor, count: int, order: Tensor) -> Tensor:
    """``xyz`` float32 ``[B, N, 3]``, ``order`` int64 ``[N]`` of preference among equals -> int64 ``[B, count]``."""
    batch, points, _ = xyz.shape
    x, y, z = (axis.contiguous() for axis in xyz[:, order].unbind(-1))
    size = _rounded_square(x, y, z)
    nearest = torch.where((size > 1e-3) & size.isfinite(), 1e10, -1.0).float().contiguous()
    chosen = torch.empty(batch, count, dtype=torch.int32, device=xyz.device)
    _furthest[(batch,)](x, y, z, nearest, chosen, points, count, CHUNK, num_warps=16)
    return order[chosen.long()]


def _rounded_square(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """As the kernels round it: products are exact in double precision. A double, for a comparison with a double."""
    inner = (x.double() ** 2 + (y * y).double()).float()
    return (z.double() ** 2 + inner.double()).float().double()


@triton.jit
def _ball(
    xyz: tl.tensor,
    centers: tl.tensor,
    found: tl.tensor,
    points: tl.tensor,
    rows: tl.tensor,
    limit: tl.tensor,
    count: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
) -> None:
    xyz += tl.program_id(1) * points * 3
    centers += tl.program_id(1) * rows * 3
    found += tl.program_id(1) * rows * count
    m = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    wanted = m < rows
    cx = tl.load(centers + 3 * m, mask=wanted, other=0.0)
    cy = tl.load(centers + 3 * m + 1, mask=wanted, other=0.0)
    cz = tl.load(centers + 3 * m + 2, mask=wanted, other=0.0)
    hits = tl.full([ROWS], 0, tl.int32)
    first = tl.full([ROWS], 0, tl.int32)
    for start in range(0, points, COLUMNS):
        k = (start + tl.arange(0, COLUMNS))[None, :]
        inside = k < points
        dx = cx - tl.load(xyz + 3 * k, mask=inside, other=0.0)
        dy = cy - tl.load(xyz + 3 * k + 1, mask=inside, other=0.0)
        dz = cz - tl.load(xyz + 3 * k + 2, mask=inside, other=0.0)
        hit = (_square(dx, dy, dz) < limit) & inside & wanted
        place = hits[:, None] + tl.cumsum(hit.to(tl.int32), axis=1) - 1
        number = tl.broadcast_to(k, (ROWS, COLUMNS))
        tl.store(found + m * count + place, number, mask=hit & (place < count))
        here = tl.sum(hit.to(tl.int32), axis=1)
        lowest = tl.min(tl.where(hit, number, points), axis=1)
        first = tl.where((hits == 0) & (here > 0), lowest, first)
        hits += here
    slot = tl.arange(0, SLOTS)[None, :]
    rest = (slot >= hits[:, None]) & (slot < count) & wanted
    tl.store(found + m * count + slot, tl.broadcast_to(first[:, None], (ROWS, SLOTS)), mask=rest)


def ball_query(xyz: Tensor, centers: Tensor, radius: float, count: int) -> Tensor:
    """float32 ``[B, N, 3]`` and ``[B, M, 3]`` -> int64 ``[B, M, count]``."""
    batch, rows, _ = centers.shape
    found = torch.empty(batch, rows, count, dtype=torch.int32, device=xyz.device)
    limit = float(np.float32(radius) * np.float32(radius))
    grid = (triton.cdiv(rows, ROWS), batch)
    slots = triton.next_power_of_2(count)
    _ball[grid](
        xyz.contiguous(),
        centers.contiguous(),
        found,
        xyz.shape[1],
        rows,
        limit,
        count,
        ROWS,
        COLUMNS,
        slots,
        num_warps=8,
    )
    return found.long()


@triton.jit
def _three(
    unknown: tl.tensor,
    known: tl.tensor,
    nearest: tl.tensor,
    rows: tl.tensor,
    others: tl.tensor,
    POINTS: tl.constexpr,
) -> None:
    unknown += tl.program_id(1) * rows * 3
    known += tl.program_id(1) * others * 3
    nearest += tl.program_id(1) * rows * 3
    u = tl.program_id(0) * POINTS + tl.arange(0, POINTS)
    inside = u < rows
    x = tl.load(unknown + 3 * u, mask=inside, other=0.0)
    y = tl.load(unknown + 3 * u + 1, mask=inside, other=0.0)
    z = tl.load(unknown + 3 * u + 2, mask=inside, other=0.0)
    best0 = tl.full([POINTS], float("inf"), tl.float32)
    best1 = best0
    best2 = best0
    at0 = tl.full([POINTS], 0, tl.int32)
    at1 = at0
    at2 = at0
    for k in range(others):
        d = _square(x - tl.load(known + 3 * k), y - tl.load(known + 3 * k + 1), z - tl.load(known + 3 * k + 2))
        at2 = tl.where(d < best1, at1, tl.where(d < best2, k, at2))
        best2 = tl.where(d < best1, best1, tl.where(d < best2, d, best2))
        at1 = tl.where(d < best0, at0, tl.where(d < best1, k, at1))
        best1 = tl.where(d < best0, best0, tl.where(d < best1, d, best1))
        at0 = tl.where(d < best0, k, at0)
        best0 = tl.where(d < best0, d, best0)
    tl.store(nearest + 3 * u, at0, mask=inside)
    tl.store(nearest + 3 * u + 1, at1, mask=inside)
    tl.store(nearest + 3 * u + 2, at2, mask=inside)


def three_nn(unknown: Tensor, known: Tensor) -> Tensor:
    """float32 ``[B, U, 3]`` and ``[B, K, 3]`` -> int64 ``[B, U, 3]``."""
    batch, rows, _ = unknown.shape
    nearest = torch.empty(batch, rows, 3, dtype=torch.int32, device=unknown.device)
    grid = (triton.cdiv(rows, POINTS), batch)
    _three[grid](unknown.contiguous(), known.contiguous(), nearest, rows, known.shape[1], POINTS, num_warps=4)
    return nearest.long()
