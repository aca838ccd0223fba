"""Streams of different kinds: which image token stands in for which point token (Eq. 2, 3 with a camera, Eq. 8, 9).

Pixels count from 0 at the centre of the first one, as (column u, row v). Points ``[B, N, 3]`` are seen by V views of their
scene; a view that is missing has a projection of zeros and sees nothing.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn


def project(points: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    """``[u, v, z] = K R [x, y, z, 1]``, then u / z and v / z (Eq. 8).

    Written out as products and sums: a matrix product would round to half precision under autocast, and pixels with it.

    Args:
        points: ``[..., N, 3]``.
        projection: ``[..., 3, 4]``, K and R in one matrix; leading dimensions are broadcast.

    Returns:
        pixels ``[..., N, 2]`` and depth ``[..., N]``; where depth is not above 0, behind the camera, pixels mean nothing.
    """
    matrix = projection.unsqueeze(-3)
    seen = (points.unsqueeze(-2) * matrix[..., :3]).sum(-1) + matrix[..., 3]
    depth = seen[..., 2]
    return seen[..., :2] / torch.where(depth > 0, depth, 1).unsqueeze(-1), depth


def patch_index(pixels: Tensor, depth: Tensor, size: tuple[int, int], patch: int) -> tuple[Tensor, Tensor]:
    """The patch that a pixel lies in, ``floor(v / P) * floor(W / P) + floor(u / P)`` (Eq. 9), and whether there is one.

    A point belongs to the pixel whose centre is nearest. It is visible in front of the camera and inside a whole patch; what
    the image's border leaves over has no token. NaN is not visible.

    Args:
        pixels: ``[..., N, 2]``.
        depth: ``[..., N]``.
        size: rows and columns of the image.
        patch: P, pixels along each axis.

    Returns:
        int64 ``[..., N]``, 0 where not visible, and visible, bool ``[..., N]``.
    """
    rows, columns = size[0] // patch, size[1] // patch
    u, v = pixels.detach().round().unbind(-1)
    inside = (u >= 0) & (u < columns * patch) & (v >= 0) & (v < rows * patch)
    visible = inside & (depth > 0)
    index = (v / patch).floor() * columns + (u / patch).floor()  # Eq. 9
    return torch.where(visible, index, 0).long(), visible


def camera_index(points: Tensor, projection: Tensor, size: tuple[int, int], patch: int) -> Tensor:
    """The patch of an image that shows each point (Eq. 8 and 9): int64 ``[B, N]``, -1 where it shows none.

    Args:
        points: ``[B, N, 3]``, where the receiving tokens lie in space.
        projection: ``[B, 3, 4]`` of the giver's camera, see :func:`project`.
        size, patch: of the giver's images, see :func:`patch_index`.
    """
    index, visible = patch_index(*project(points, projection), size, patch)
    return torch.where(visible, index, -1)


def same_share(receivers: int, givers: int, device: torch.device | None = None) -> Tensor:
    """For each of some equal parts of a stretch, the part of another division that holds its middle: int64 ``[receivers]``."""
    return (2 * torch.arange(receivers, device=device) + 1) * givers // (2 * receivers)


def grid_index(receiver: tuple[int, int], giver: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Two patch grids over one image: the giver's patch that holds the middle of each of the receiver's, int64 ``[N]``.

    Args:
        receiver, giver: rows and columns of patches, which cover the same area.
        device: where the index is wanted.
    """
    rows, columns = (same_share(r, g, device) for r, g in zip(receiver, giver, strict=True))
    return (rows.unsqueeze(1) * giver[1] + columns).flatten()


def time_index(
    receiver: tuple[int, ...], giver: tuple[int, ...], receiver_time: int = -1, giver_time: int = -1
) -> Tensor:
    """Two token grids over one span of time: a giver's token of the same moment for each of the receiver's, int64 ``[N]``.

    Of the tokens of that moment it is the one at the same share: the same frequency band where both are spectrograms.

    Args:
        receiver, giver: numbers of tokens along each axis, in the order in which the network lays them out, the last one
            fastest: (frequencies, times) for an audio spectrogram transformer, (times, rows, columns) for a video,
            (1, rows, columns) for a picture, which lies in the middle of the span.
        receiver_time, giver_time: which axis is time.

    Raises:
        ValueError: where there is no such axis.
    """
    shapes, axes = (receiver, giver), (receiver_time, giver_time)
    for shape, axis in zip(shapes, axes, strict=True):
        if not -len(shape) <= axis < len(shape):
            raise ValueError(f"time axis {axis} of a token grid {shape}: there is none; it has {len(shape)} axes")
    times = [shape[axis] for shape, axis in zip(shapes, axes, strict=True)]
    at_once = [math.prod(shape) // time for shape, time in zip(shapes, times, strict=True)]
    place = torch.arange(math.prod(giver)).view(giver).movedim(giver_time, 0).flatten(1)  # [times, tokens at once]
    picked = place[same_share(times[0], times[1])][:, same_share(at_once[0], at_once[1])]
    others = [n for axis, n in enumerate(receiver) if axis != receiver_time % len(receiver)]
    return picked.view(times[0], *others).movedim(0, receiver_time).flatten()


def gather_views(tokens: Tensor, index: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Every point's stand-in: the mean of the image tokens it is seen at (Eq. 2 and 3); with one view that very token.

    Args:
        tokens: of the views' patches, ``[B, V, P, C]``.
        index: patch of each point in each view, int64 ``[B, V, N]``.
        visible: bool ``[B, V, N]``.

    Returns:
        stand-ins ``[B, N, C]``, zeros where no view sees the point, and which points have one, bool ``[B, N]``: the others are
        never replaced.
    """
    picked = tokens.gather(2, index.unsqueeze(-1).expand(*index.shape, tokens.shape[-1]))
    total = torch.where(visible.unsqueeze(-1), picked, 0).sum(1)
    views = visible.sum(1)
    return total / views.clamp(min=1).unsqueeze(-1), views > 0


def scatter_mean(tokens: Tensor, index: Tensor, visible: Tensor, patches: int) -> tuple[Tensor, Tensor]:
    """The other way round: every patch's stand-in is the mean of the points that lie in it.

    On a processor the order of the sums is fixed. A GPU adds in any order, so that the last bits differ from run to run
    unless ``torch.use_deterministic_algorithms`` is on.

    Args:
        tokens: of the points, ``[B, N, C]``.
        index, visible: as in :func:`gather_views`.
        patches: P, the number of patches of a view.

    Returns:
        stand-ins ``[B, V, P, C]``, zeros where a patch has no point, and which patches have one, bool ``[B, V, P]``.
    """
    batch, views, _ = index.shape
    nowhere = batch * views * patches  # one more row collects what no view sees
    first = torch.arange(0, nowhere, patches, device=index.device).view(batch, views, 1)
    place = torch.where(visible, first + index, nowhere).flatten()
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    source = wide.unsqueeze(1).expand(-1, views, -1, -1).flatten(0, 2)
    total = source.new_zeros(nowhere + 1, tokens.shape[-1]).index_add(0, place, source)[:-1]
    count = torch.zeros(nowhere + 1, dtype=torch.int64, device=index.device)
    count = count.index_add(0, place, torch.ones_like(place))[:-1]
    mean = (total / count.clamp(min=1).unsqueeze(-1)).to(tokens.dtype)
    return mean.view(batch, views, patches, -1), (count > 0).view(batch, views, patches)


def projection_net(dim_in: int, dim_out: int, hidden: int | None = None) -> nn.Sequential:
    """The shallow MLP h between streams of different kinds (Eq. 2): three linear layers with ReLU between, as released.

    ``hidden`` is the width between them, that of the input as released.

    It starts as one that keeps the spread of its input. PyTorch's own start shrinks it twentyfold, and what tells one stand-in
    from another would drown in the positions that are added to all of them.
    """
    hidden = hidden or dim_in
    linears = nn.Linear(dim_in, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, dim_out)
    for layer, gain in zip(linears, (2.0, 2.0, 1.0), strict=True):
        nn.init.normal_(layer.weight, std=(gain / layer.in_features) ** 0.5)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(linears[0], nn.ReLU(), linears[1], nn.ReLU(), linears[2])


def pair_layers(image_depth: int, point_depth: int) -> tuple[range, ...]:
    """Which image blocks run before each layer of the point network, for any two depths.

    All blocks run, in order and spread evenly: 12 and 6 are two each, as released. Where there are fewer blocks than layers
    some layers have no new one; the first always has, if there is any.

    Raises:
        ValueError: where there is no layer, or less than no block.
    """
    if image_depth < 0 or point_depth < 1:
        raise ValueError(f"at least 0 blocks and 1 layer are wanted; got {image_depth} and {point_depth}")
    bounds = [-(-image_depth * layer // point_depth) for layer in range(point_depth + 1)]
    return tuple(range(start, stop) for start, stop in itertools.pairwise(bounds))
