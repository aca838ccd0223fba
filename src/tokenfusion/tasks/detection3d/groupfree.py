"""Group-Free-3D (Liu et al., 2021): 3D boxes from a point cloud by a transformer decoder over its seeds, without grouping."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tokenfusion.backbones.pointnet2 import (
    PUBLISHED,
    SEED_DIM,
    PointIndices,
    PointNet2,
    Pointwise,
    Seeds,
    check_counts,
    point_indices,
)
from tokenfusion.backbones.pointops import gather
from tokenfusion.data.boxes import wrap_angle
from tokenfusion.tasks.detection3d.decoder import DecoderLayer, initialise

HEADS, HIDDEN = 8, 2048  # attention heads and width of the MLPs, as published
Fuse = Callable[[int, Tensor], Tensor]
FuseRead = Callable[[int, Tensor, Tensor], Tensor]


class HeadOutput(NamedTuple):
    """Predictions of one head for ``Q`` queries; headings are Group-Free's, clockwise seen from above."""

    base_xyz: Tensor  # [B, Q, 3] the query points
    center: Tensor  # [B, Q, 3] metres
    objectness: Tensor  # [B, Q] logits
    heading_scores: Tensor  # [B, Q, NH]
    heading_residuals_normalized: Tensor  # [B, Q, NH] in half bins
    size: Tensor  # [B, Q, 3] full, metres; nothing keeps a network from predicting less than 0
    size_scores: Tensor | None  # [B, Q, NS], where sizes are relative to mean sizes
    size_residuals: Tensor | None  # [B, Q, NS, 3] relative to the mean size
    class_scores: Tensor  # [B, Q, C]


class GroupFreeOutput(NamedTuple):
    """What losses and decoding need."""

    seeds: Seeds
    seed_logits: Tensor | None  # [B, S] of being on an object; None where queries are sampled by distance
    query_index: Tensor  # int64 [B, Q] into the seeds
    heads: list[HeadOutput]
    names: tuple[str, ...]  # of the heads: "proposal", "0head", ..., "last"
    mean_sizes: Tensor | None  # [NS, 3]


class KeyPoints(nn.Module):
    """Closest Points Sampling's classifier: how likely a seed is among the points nearest to an object's centre."""

    def __init__(self, dim: int, momentum: float) -> None:
        super().__init__()
        self.hidden = nn.Sequential(*(Pointwise(dim, dim, True, momentum) for _ in range(2)))
        self.score = nn.Linear(dim, 1)

    def forward(self, features: Tensor) -> Tensor:
        """``[B, S, C] -> [B, S]`` logits."""
        return self.score(self.hidden(features)).squeeze(-1)


class PredictionHead(nn.Module):
    """One set of box and class predictions per query.

    Args:
        mean_sizes: ``[NS, 3]`` full sizes that predicted ones are relative to; None: sizes are predicted in metres.
    """

    mean_sizes: Tensor | None

    def __init__(self, dim: int, classes: int, heading_bins: int, mean_sizes: Tensor | None, momentum: float) -> None:
        super().__init__()
        self.register_buffer("mean_sizes", mean_sizes, persistent=False)
        self.hidden = nn.Sequential(*(Pointwise(dim, dim, True, momentum) for _ in range(2)))
        self.objectness = nn.Linear(dim, 1)
        self.center = nn.Linear(dim, 3)
        self.heading_class = nn.Linear(dim, heading_bins)
        self.heading_residual = nn.Linear(dim, heading_bins)
        if mean_sizes is None:
            self.size = nn.Linear(dim, 3)
        else:
            self.size_class = nn.Linear(dim, len(mean_sizes))
            self.size_residual = nn.Linear(dim, 3 * len(mean_sizes))
        self.classify = nn.Linear(dim, classes)

    def forward(self, query: Tensor, base_xyz: Tensor) -> HeadOutput:
        """``query [B, Q, C]`` of the points ``base_xyz [B, Q, 3]``."""
        x = self.hidden(query)
        size, scores, residuals = self._sizes(x)
        return HeadOutput(
            base_xyz,
            base_xyz + self.center(x),
            self.objectness(x).squeeze(-1),
            self.heading_class(x),
            self.heading_residual(x),
            size,
            scores,
            residuals,
            self.classify(x),
        )

    def _sizes(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if self.mean_sizes is None:
            return self.size(x), None, None
        scores, residuals = self.size_class(x), self.size_residual(x).unflatten(-1, (-1, 3))
        best = scores.argmax(-1)
        residual = residuals.take_along_dim(best[..., None, None], -2).squeeze(-2)
        return self.mean_sizes[best] * (1 + residual), scores, residuals


def _check_mean_sizes(mean_sizes: Sequence[Sequence[float]], classes: int) -> None:
    if len(mean_sizes) != classes:
        raise ValueError(f"mean_sizes: {len(mean_sizes)} mean sizes for {classes} classes: wanted one each")
    for size in mean_sizes:
        if np.shape(size) != (3,) or not min(size) > 0:
            raise ValueError(f"mean_sizes: wanted three lengths above 0 of each class, in metres, not {size}")


class GroupFree(nn.Module):
    """The detector: PointNet++ seeds, queries among them, a decoder, and a head after each of its layers.

    Shape: clouds ``[B, N, channels]`` -> :class:`GroupFreeOutput` with ``layers + 1`` heads.

    Args:
        classes: that boxes have.
        heading_bins: of the full circle; 1: all boxes are aligned with the axes.
        mean_sizes: ``[NS, 3]`` full sizes in metres, one per class, that predicted sizes are relative to; None: metres.
        layers: of the decoder.
        proposals: queries.
        sampling: which seeds become queries: those that look most like an object's ("kps") or the furthest apart ("fps").
        width, channels, points, radii, samples: of :class:`~tokenfusion.backbones.pointnet2.PointNet2`.
        dropout: in the decoder.
        momentum: of all batch norms.

    Raises:
        ValueError: where there are more proposals than seeds, no layer, not one mean size per class, or a number is none of
            its kind.
    """

    mean_sizes: Tensor | None

    def __init__(
        self,
        classes: int,
        heading_bins: int = 12,
        mean_sizes: Sequence[Sequence[float]] | None = None,
        layers: int = 6,
        proposals: int = 256,
        sampling: Literal["kps", "fps"] = "kps",
        width: float = 1,
        channels: int = 3,
        points: Sequence[int] = PUBLISHED.points,
        radii: Sequence[float] = PUBLISHED.radii,
        samples: Sequence[int] = PUBLISHED.samples,
        dropout: float = 0.1,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        check_counts(heading_bins=[heading_bins], layers=[layers], proposals=[proposals])
        if mean_sizes is not None:
            _check_mean_sizes(mean_sizes, classes)
        self.backbone = PointNet2(channels, width, points, radii, samples, momentum)
        seeds = self.backbone.levels.points[1]
        if proposals > seeds:
            raise ValueError(f"{proposals} proposals of {seeds} seeds: wanted 1..{seeds}")
        if sampling not in ("kps", "fps"):
            raise ValueError(f"sampling must be kps or fps, not {sampling!r}")
        means = None if mean_sizes is None else torch.tensor(mean_sizes, dtype=torch.float32)
        self.dim, self.layers, self.proposals = SEED_DIM, layers, proposals
        self.names = ("proposal", *(f"{i}head" for i in range(layers - 1)), "last")
        self.register_buffer("mean_sizes", means, persistent=False)
        self.kps = KeyPoints(SEED_DIM, momentum) if sampling == "kps" else None
        self.decoder_query = nn.Linear(SEED_DIM, SEED_DIM)
        self.decoder_key = nn.Linear(SEED_DIM, SEED_DIM)
        self.decoder = nn.ModuleList(DecoderLayer(SEED_DIM, HEADS, HIDDEN, dropout, momentum) for _ in range(layers))
        initialise(self.decoder)
        self.heads = nn.ModuleList(
            PredictionHead(SEED_DIM, classes, heading_bins, means, momentum) for _ in range(layers + 1)
        )

    def encode(self, points: Tensor, indices: PointIndices | None = None) -> Seeds:
        """The seeds of clouds ``[B, N, channels]``."""
        return self.backbone(points, indices)

    def decode(self, seeds: Seeds, fuse: Fuse | None = None, fuse_read: FuseRead | None = None) -> GroupFreeOutput:
        """Boxes from seeds.

        Args:
            fuse: ``fuse(layer, key [B, S, 288]) -> key``, called by each layer on its keys before their positions are
                added; the next layer starts from the unfused keys again.
            fuse_read: ``fuse_read(layer, index [B, Q], read [B, Q, 288]) -> read``, called by each layer after ``fuse`` on what
                its queries, the seeds of these indices, have read from the keys, before it is added to them.
        """
        logits = None if self.kps is None else self.kps(seeds.features)
        index = self._choose(seeds, logits)
        xyz, query = gather(seeds.xyz, index), gather(seeds.features, index)
        outputs = [self.heads[0](query, xyz)]
        query, key = self.decoder_query(query), self.decoder_key(seeds.features)
        for i, layer in enumerate(self.decoder):
            box = torch.cat([outputs[-1].center, outputs[-1].size], -1).detach()
            fused = key if fuse is None else fuse(i, key)
            reading = None if fuse_read is None else partial(fuse_read, i, index)
            query = layer(query, fused, box, seeds.xyz, reading)
            outputs.append(self.heads[i + 1](query, xyz))
        return GroupFreeOutput(seeds, logits, index, outputs, self.names, self.mean_sizes)

    def _choose(self, seeds: Seeds, logits: Tensor | None) -> Tensor:
        """The seeds that become queries, int64 ``[B, Q]``; in the order of furthest points a beginning is furthest apart."""
        if logits is not None:
            return logits.detach().topk(self.proposals).indices
        return torch.arange(self.proposals, device=seeds.xyz.device).expand(len(seeds.xyz), -1)

    def forward(self, points: Tensor, indices: PointIndices | None = None, fuse: Fuse | None = None) -> GroupFreeOutput:
        return self.decode(self.encode(points, indices), fuse)

    def indexer(self) -> Callable[[Tensor], PointIndices]:
        """What finds the indices of a cloud ahead, for the workers that read data; it holds no weights."""
        return partial(point_indices, levels=self.backbone.levels)

    def decoder_modules(self) -> list[nn.Module]:
        """What learns at the decoder's own rate."""
        return [self.decoder_query, self.decoder_key, self.decoder]

    def boxes(self, head: HeadOutput) -> Tensor:
        """The predicted boxes ``[B, Q, 7]``: centre, full sizes (at least 0) in metres, yaw counter-clockwise, in -pi..pi."""
        bins = head.heading_scores.shape[-1]
        best = head.heading_scores.argmax(-1, keepdim=True)
        residual = head.heading_residuals_normalized.take_along_dim(best, -1)
        heading = (2 * best + residual) * (math.pi / bins) if bins > 1 else torch.zeros_like(residual)
        return torch.cat([head.center, head.size.clamp(min=0), wrap_angle(-heading)], -1)
