"""Point operations of PointNet++ (Qi et al., 2017): furthest points, ball query, three nearest points, interpolation.

The indices are those of the CUDA kernels that published networks were trained with: where the search starts, which points
are skipped, who wins a tie, and the rounding of distances, ``fma(dz, dz, fma(dx, dx, dy * dy))`` in float32. They depend on
coordinates alone, carry no gradient and may be computed ahead, in the workers that read the data. On a CPU they come from
numba, on CUDA from Triton, elsewhere from plain torch, slowly. What gathers and interpolates is plain torch everywhere,
and differentiable.

Coordinates are metres. A point that is not finite is never found by a ball or as a neighbour, and is chosen as a furthest
point only if it is the first of its cloud; readers of data drop such points.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

MOST_THREADS = 512  # of the reference's kernel; decides ties between equally far points


def furthest_point_sample(xyz: Tensor, count: int) -> Tensor:
    """Indices of ``count`` points, each the furthest from all before it; the first point of the cloud comes first.

    Points within sqrt(1e-3) metres of the origin are skipped: sensors write holes there. A cloud with fewer than ``count``
    points repeats some.

    Args:
        xyz: ``[B, N, 3]``, N > 0.

    Returns:
        int64 ``[B, count]``.
    """
    _check(xyz)
    if count < 1:
        raise ValueError(f"furthest_point_sample: at least one point is wanted, not {count}")
    return torch.ops.tokenfusion.furthest_point_sample(xyz.detach().float(), count)


def ball_query(xyz: Tensor, centers: Tensor, radius: float, count: int) -> Tensor:
    """The first ``count`` points, in their order, that lie nearer than ``radius`` to each centre.

    A ball with fewer points repeats its first; an empty one holds point 0 alone.

    Args:
        xyz: ``[B, N, 3]``.
        centers: ``[B, M, 3]``.
        radius: in metres, positive.

    Returns:
        int64 ``[B, M, count]``.
    """
    _check(xyz)
    if not radius > 0:
        raise ValueError(f"ball_query: the radius must be positive, not {radius}")
    return torch.ops.tokenfusion.ball_query(xyz.detach().float(), centers.detach().float(), radius, count)


def three_nn(unknown: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """The three nearest ``known [B, K, 3]`` of each point of ``unknown [B, U, 3]``, nearest first.

    Returns:
        distance ``[B, U, 3]`` in metres and index int64 ``[B, U, 3]``; fewer than three known points: the first repeats.
    """
    _check(known)
    index = torch.ops.tokenfusion.three_nn(unknown.detach().float(), known.detach().float())
    return distances(unknown, known, index), index


def distances(unknown: Tensor, known: Tensor, index: Tensor) -> Tensor:
    """Metres between ``unknown [B, U, 3]`` and those ``known [B, K, 3]`` that ``index [B, U, k]`` names: ``[B, U, k]``."""
    return torch.linalg.vector_norm(gather(known, index) - unknown[:, :, None], dim=-1)


def interpolate(features: Tensor, distance: Tensor, index: Tensor) -> Tensor:
    """Mean of the named ``features [B, K, C]``, weighed by 1 / (distance + 1e-8): ``[B, U, C]``.

    Args:
        distance: ``[B, U, k]`` in metres.
        index: ``[B, U, k]``.
    """
    weight = 1 / (distance + 1e-8)
    weight = weight / weight.sum(-1, keepdim=True)
    return (gather(features, index) * weight[..., None].to(features.dtype)).sum(2)


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x [B, N, C]`` that ``index [B, ...]`` (int32 or int64) names, sample by sample: ``[B, ..., C]``."""
    batch, rows, width = x.shape
    first = torch.arange(0, batch * rows, rows, device=x.device).view(-1, *[1] * (index.dim() - 1))
    return x.reshape(-1, width).index_select(0, (index + first).flatten()).view(*index.shape, width)


@lru_cache(maxsize=8)
def tie_order(points: int) -> np.ndarray:
    """The points of a cloud in the order in which the reference prefers them when they are equally far, int64 ``[N]``.

    Its block of threads shares the points out by turns. A thread keeps its first; between threads a tree of comparisons
    keeps the one whose number, read from the lowest bit to the highest, is smaller.
    """
    bits = min(MOST_THREADS, points).bit_length() - 1
    number = np.arange(points)
    thread = number % 2**bits
    mirrored = sum(((thread >> bit) & 1) << (bits - 1 - bit) for bit in range(bits))
    return np.lexsort((number, np.broadcast_to(mirrored, number.shape)))


@lru_cache(maxsize=8)
def _tie_order_on(points: int, device: torch.device) -> Tensor:
    return torch.from_numpy(tie_order(points)).to(device)  # kept: copying it in each step would wait for the device


def _check(xyz: Tensor) -> None:
    if xyz.dim() != 3 or xyz.shape[-1] != 3 or xyz.shape[1] == 0:
        raise ValueError(f"point operations want coordinates [B, N, 3] with N > 0, not {list(xyz.shape)}")


def _on_device(xyz: Tensor) -> ModuleType:
    """The searches for clouds that do not lie on the CPU."""
    triton = xyz.is_cuda and find_spec("triton") is not None
    return import_module(f"tokenfusion.backbones.pointops_{'triton' if triton else 'torch'}")


# ---- one operator each: opaque to torch.compile, which knows their shapes ------------------------------------------


@torch.library.custom_op("tokenfusion::furthest_point_sample", mutates_args=())
def _furthest_point_sample(xyz: Tensor, count: int) -> Tensor:
    if not xyz.is_cpu:
        return _on_device(xyz).furthest_point_sample(xyz, count, _tie_order_on(xyz.shape[1], xyz.device))
    from tokenfusion.backbones import pointops_numba

    order = tie_order(xyz.shape[1])
    chosen = torch.empty(xyz.shape[0], count, dtype=torch.int64)
    for cloud, row in zip(xyz.numpy(), chosen.numpy(), strict=True):
        pointops_numba.furthest(cloud, order, row)
    return chosen


@_furthest_point_sample.register_fake
def _(xyz: Tensor, count: int) -> Tensor:
    return xyz.new_empty(xyz.shape[0], count, dtype=torch.int64)


@torch.library.custom_op("tokenfusion::ball_query", mutates_args=())
def _ball_query(xyz: Tensor, centers: Tensor, radius: float, count: int) -> Tensor:
    if not xyz.is_cpu:
        return _on_device(xyz).ball_query(xyz, centers, radius, count)
    from tokenfusion.backbones import pointops_numba

    found = torch.empty(*centers.shape[:2], count, dtype=torch.int64)
    for cloud, middles, rows in zip(xyz.numpy(), centers.numpy(), found.numpy(), strict=True):
        pointops_numba.ball(cloud, middles, np.float32(radius), rows)
    return found


@_ball_query.register_fake
def _(xyz: Tensor, centers: Tensor, radius: float, count: int) -> Tensor:
    return centers.new_empty(*centers.shape[:2], count, dtype=torch.int64)


@torch.library.custom_op("tokenfusion::three_nn", mutates_args=())
def _three_nn(unknown: Tensor, known: Tensor) -> Tensor:
    if not known.is_cpu:
        return _on_device(known).three_nn(unknown, known)
    from tokenfusion.backbones import pointops_numba

    nearest = torch.empty(unknown.shape, dtype=torch.int64)
    for points, cloud, rows in zip(unknown.numpy(), known.numpy(), nearest.numpy(), strict=True):
        pointops_numba.three(points, cloud, rows)
    return nearest


@_three_nn.register_fake
def _(unknown: Tensor, known: Tensor) -> Tensor:
    return torch.empty_like(unknown, dtype=torch.int64)
