"""The fused detector: Group-Free on points and YOLOS on images, whose layers exchange tokens through the camera."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tokenfusion.backbones.pointnet2 import PointIndices
from tokenfusion.backbones.pointops import gather
from tokenfusion.backbones.vit import resampled
from tokenfusion.backbones.yolos import Yolos, YolosOutput
from tokenfusion.data.scenes import IMAGE, POINTS
from tokenfusion.fusion.crossing import Exchange
from tokenfusion.fusion.exchange import ExchangeRates, exchange_rates
from tokenfusion.fusion.projection import (
    gather_views,
    pair_layers,
    patch_index,
    project,
    projection_net,
    scatter_mean,
)
from tokenfusion.tasks.detection3d.groupfree import GroupFree, GroupFreeOutput

ExchangeFactory = Callable[[int], Exchange]  # token width -> exchange


class Scored(NamedTuple):
    """What one layer decided about the tokens of one stream."""

    scores: Tensor  # [B, N], or [B, V, P] of the patches
    has: Tensor  # bool, of the same shape: there is a stand-in


class DetectionOutput(NamedTuple):
    """Boxes of both networks, and the scores that decided what was exchanged."""

    points: GroupFreeOutput
    image: YolosOutput | None  # of the B * V views; None without images
    keys: list[Scored]  # per decoder layer: the seeds
    queries: list[Scored]  # per decoder layer: what they read from the keys, where that is exchanged
    patches: list[Scored]  # the images' patches, per decoder layer that points go to images from
    visible: Tensor | None  # bool [B, S]: seeds that some view shows


class Geometry(NamedTuple):
    """Where the seeds appear in the views (Eq. 8, 9)."""

    patch: Tensor  # int64 [B, V, S]
    visible: Tensor  # bool [B, V, S]


class FusedDetector(nn.Module):
    """Finds objects in a point cloud and the images of its scene.

    Before each decoder layer of the points' network its share of the image's blocks runs; then the layer's keys take in the
    patches that their points project to, and with ``both`` the patches the points' tokens. With ``exchange_queries`` what a
    query reads from the keys, the residual branch of the layer's cross-attention, takes in the patch of the query's own point,
    as the released rule has it for attention. Without images it is the points' network alone.

    Args:
        points: the detector of points.
        image: the detector of images; None = points alone.
        exchange: makes what decides, from the width of the tokens.
        both: points go to images too (the paper's Fig. 2), not only images to points (released); not behind the image's
            last block, where nobody reads the patches any more.
        detach: gradients do not reach a stream through the stand-ins that it gives.
        alignment: the patches' position embedding is re-added before every layer but the first, its gradient stopped;
            only with ``both``. Keys are told their position by Group-Free itself.
        exchange_queries: queries meet the image too, not through the keys alone (released).

    Example: ``output = model(points, images, projection); boxes = model.points.boxes(output.points.heads[-1])``
    """

    def __init__(
        self,
        points: GroupFree,
        image: Yolos | None,
        exchange: ExchangeFactory,
        both: bool = False,
        detach: bool = True,
        alignment: bool = True,
        exchange_queries: bool = False,
    ) -> None:
        super().__init__()
        self.points, self.image, self.both, self.detach = points, image, both, detach
        self.alignment = alignment and both
        layers = points.layers if image is not None else 0
        width = image.dim if image is not None else 0
        self.pairs = pair_layers(image.depth, layers) if image is not None else ()
        giving = sum(blocks.stop < image.depth for blocks in self.pairs) if both and image is not None else 0
        self.to_point = nn.ModuleList(projection_net(width, points.dim) for _ in range(layers))
        self.key_exchange = nn.ModuleList(exchange(points.dim) for _ in range(layers))
        asking = layers if exchange_queries else 0
        self.to_query = nn.ModuleList(projection_net(width, points.dim) for _ in range(asking))
        self.query_exchange = nn.ModuleList(exchange(points.dim) for _ in range(asking))
        self.to_image = nn.ModuleList(projection_net(points.dim, width) for _ in range(giving))
        self.patch_exchange = nn.ModuleList(exchange(width) for _ in range(giving))

    @property
    def threshold(self) -> float | None:
        """Theta of the exchange; None where it does not go by scores."""
        return next((e.threshold for e in self.key_exchange if isinstance(e, Exchange)), None)

    @property
    def exchanging(self) -> tuple[str, ...]:
        """What takes in stand-ins, as logs name it."""
        queries = ["queries"] if len(self.query_exchange) > 0 else []
        return (POINTS, *([IMAGE] if self.both else []), *queries)

    def forward(
        self,
        points: Tensor,
        images: Tensor | None = None,
        projection: Tensor | None = None,
        index: PointIndices | None = None,
    ) -> DetectionOutput:
        """What every head says of the proposals, what the image's boxes are, and what was exchanged.

        Args:
            points: ``[B, N, 3 + C]``, upright metres.
            images: ``[B, V, 3, H, W]`` normalised; a view that is missing has a projection of zeros.
            projection: ``[B, V, 3, 4]``, see :func:`~tokenfusion.fusion.projection.project`.
            index: the indices of the points, where the loader found them.
        """
        seeds = self.points.encode(points, index)
        if self.image is None or images is None or projection is None or images.shape[1] == 0:
            return DetectionOutput(self.points.decode(seeds), None, [], [], [], None)
        meeting = _Meeting(self, self.image, seeds.xyz, images, projection)
        found = self.points.decode(seeds, meeting, meeting.read if self.query_exchange else None)
        boxes = self.image.head(meeting.tokens)
        visible = meeting.geometry.visible.any(1)
        return DetectionOutput(found, boxes, meeting.keys, meeting.queries, meeting.patches, visible)

    def rates(self, output: DetectionOutput) -> dict[str, ExchangeRates]:
        """What was exchanged: ``{"layer0": rates}``, in the order of ``exchanging``; shares of the tokens with a stand-in."""
        if self.threshold is None:
            return {}
        rates = {}
        for layer, key in enumerate(output.keys):
            shares = [_share(scored, self.threshold) for scored in (key, *output.patches[layer : layer + 1])]
            shares += [torch.zeros_like(shares[0])] * (1 + self.both - len(shares))  # behind the image's last block
            shares += [_share(scored, self.threshold) for scored in output.queries[layer : layer + 1]]
            rates[f"layer{layer}"] = ExchangeRates(torch.cat(shares), torch.zeros(len(shares)))
        return rates


def _share(scored: Scored, threshold: float) -> Tensor:
    """What was exchanged of the tokens that have a stand-in, ``[1]``."""
    scores, has = (x.flatten(1)[None] for x in scored)
    return exchange_rates(scores, scores, threshold, has=has).exchanged


class _Meeting:
    """One forward pass of the image's network beside the decoder: called with a layer's keys, it gives the fused ones.

    ``read`` does so for what the layer's queries have read from them, with the same blocks' patches.
    """

    def __init__(self, model: FusedDetector, image: Yolos, xyz: Tensor, images: Tensor, projection: Tensor) -> None:
        self.model, self.image, self.views = model, image, images.shape[1]
        self.tokens, self.grid = image.embed(images.flatten(0, 1))
        self.position = resampled(image.vit.pos_embed, image.vit.grid, self.grid)[:, 1:].detach()
        pixels, depth = project(xyz.unsqueeze(1), projection)
        size = (images.shape[-2], images.shape[-1])
        self.geometry = Geometry(*patch_index(pixels, depth, size, image.patch))
        self.keys: list[Scored] = []
        self.queries: list[Scored] = []
        self.patches: list[Scored] = []

    def __call__(self, layer: int, key: Tensor) -> Tensor:
        model, patches = self.model, slice(1, 1 + self.grid[0] * self.grid[1])
        if layer > 0 and model.alignment:
            self.tokens = _put(self.tokens, patches, self.tokens[:, patches] + self.position)
        for block in model.pairs[layer]:
            self.tokens = self.image.block(block, self.tokens, self.grid)
        seen = self.tokens[:, patches].unflatten(0, (-1, self.views))
        giving = seen.detach() if model.detach else seen
        self.stand_in, self.has = gather_views(giving, *self.geometry)
        fused, scores = model.key_exchange[layer](key, model.to_point[layer](self.stand_in), self.has)
        if scores is not None:
            self.keys.append(Scored(scores, self.has))
        if layer < len(model.to_image):
            self._to_image(layer, key.detach() if model.detach else key, seen, patches)
        return fused

    def read(self, layer: int, index: Tensor, read: Tensor) -> Tensor:
        """What the queries have read from the layer's keys takes in the patches that their own points project to."""
        stand_in, has = gather(self.stand_in, index), self.has.gather(1, index)
        fused, scores = self.model.query_exchange[layer](read, self.model.to_query[layer](stand_in), has)
        if scores is not None:
            self.queries.append(Scored(scores, has))
        return fused

    def _to_image(self, layer: int, key: Tensor, seen: Tensor, patches: slice) -> None:
        """Patches take in the mean of the projected tokens of the points that they show."""
        model = self.model
        stand_in, has = scatter_mean(model.to_image[layer](key), *self.geometry, seen.shape[2])
        fused, scores = model.patch_exchange[layer](seen.flatten(0, 1), stand_in.flatten(0, 1), has.flatten(0, 1))
        self.tokens = _put(self.tokens, patches, fused)
        if scores is not None:
            self.patches.append(Scored(scores.unflatten(0, (-1, self.views)), has))


def _put(tokens: Tensor, where: slice, value: Tensor) -> Tensor:
    """``tokens`` with other ones in a stretch of them."""
    return torch.cat([tokens[:, : where.start], value.to(tokens.dtype), tokens[:, where.stop :]], 1)
