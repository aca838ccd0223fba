"""The losses of Group-Free-3D: every query answers for the object that its point lies on, at every head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from pydantic import ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

from tokenfusion.backbones.pointops import gather
from tokenfusion.components import Section
from tokenfusion.data.boxes import axis_aligned_extent
from tokenfusion.tasks.detection3d.groupfree import GroupFreeOutput, HeadOutput
from tokenfusion.tasks.precision import at_least_single

if TYPE_CHECKING:
    from tokenfusion.data.scenes import SceneTruth

TOTAL = 10.0  # the published factor of the whole loss
CLASSIFICATION = 0.1  # of the cross-entropies of heading bins and size classes, beside their regressions


class LossSettings(Section):
    """Coefficients; the defaults are the published ones of SUN RGB-D."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kps: float = Field(0.2, ge=0)
    objectness: float = Field(0.4, ge=0)
    box: float = Field(1.0, ge=0)
    semantic: float = Field(0.1, ge=0)
    center_delta: float = Field(1 / 9, gt=0)  # metres: where smooth L1 turns linear
    size_delta: float = Field(0.0625, gt=0)  # metres, or parts of the mean size
    heading_delta: float = Field(0.04, gt=0)  # half bins
    topk: int = Field(4, ge=1)  # seeds per object that are good queries
    gt_size: Literal["exact", "groupfree"] = (
        "exact"  # groupfree: the axis-aligned extent of the turned box, as published
    )


class Targets(NamedTuple):
    """What every query ``[B, Q]`` of any head should predict; background queries point at an object of zeros."""

    positive: Tensor  # bool
    center: Tensor  # [B, Q, 3]
    size: Tensor  # [B, Q, 3]
    heading_class: Tensor  # int64
    heading_residual: Tensor  # in half bins
    labels: Tensor  # int64


class HeadLosses(NamedTuple):
    """One number per head, ``[L + 1]``, before any coefficient."""

    objectness: Tensor
    center: Tensor
    heading_class: Tensor
    heading_residual: Tensor
    size_class: Tensor  # 0 where sizes are predicted in metres
    size_residual: Tensor
    semantic: Tensor


def groupfree_losses(output: GroupFreeOutput, truth: SceneTruth, settings: LossSettings) -> dict[str, Tensor]:
    """The terms of the loss by name, with all factors: their sum is what is minimised. Scenes without boxes are fine.

    Returns:
        scalars in float32 or better: kps, objectness, center, heading, size, class.
    """
    sizes = truth.boxes[..., 3:6] if settings.gt_size == "exact" else axis_aligned_extent(truth.boxes)
    each = head_losses(output, truth, sizes, settings)
    heads = TOTAL / len(output.heads)
    heading = CLASSIFICATION * each.heading_class + settings.heading_delta * each.heading_residual
    size = CLASSIFICATION * each.size_class + settings.size_delta * each.size_residual
    terms = {
        "objectness": heads * settings.objectness * each.objectness.sum(),
        "center": heads * settings.box * each.center.sum(),
        "heading": heads * settings.box * heading.sum(),
        "size": heads * settings.box * size.sum(),
        "class": heads * settings.semantic * each.semantic.sum(),
    }
    if output.seed_logits is not None:
        terms["kps"] = TOTAL * settings.kps * key_point_loss(output, truth, sizes, settings.topk)
    return terms


def key_point_loss(output: GroupFreeOutput, truth: SceneTruth, sizes: Tensor, topk: int) -> Tensor:
    """Focal loss of the seeds' logits: the ``topk`` seeds on an object that are nearest to its centre are the good ones."""
    assert output.seed_logits is not None
    labels = key_points(output.seeds.xyz, _object_of(output.seeds.index, truth), truth, sizes, topk)
    return focal(output.seed_logits, labels).mean()


def key_points(xyz: Tensor, owner: Tensor, truth: SceneTruth, sizes: Tensor, topk: int) -> Tensor:
    """Which seeds are good queries, bool ``[B, S]``; distances are measured in sizes of the box.

    An object with fewer than ``topk`` seeds has that many good ones; the published code then also takes arbitrary seeds of
    other objects.

    Args:
        xyz: ``[B, S, 3]``.
        owner: row of the object that a seed lies on, -1 = background, int64 ``[B, S]``.
        sizes: ``[B, K, 3]``.
    """
    count = truth.boxes.shape[1]
    offset = (xyz[:, None] - truth.boxes[:, :, None, :3]) / (sizes[:, :, None] + 1e-6)
    distance = (offset.square().sum(-1) + 1e-6).sqrt()  # [B, K, S]
    own = (owner[:, None] == torch.arange(count, device=owner.device)[:, None]) & truth.mask[..., None]
    near = distance.masked_fill(~own, math.inf).topk(min(topk, xyz.shape[1]), largest=False).indices
    return (torch.zeros_like(own).scatter(-1, near, True) & own).any(1)


def head_losses(output: GroupFreeOutput, truth: SceneTruth, sizes: Tensor, settings: LossSettings) -> HeadLosses:
    """All heads at once, since they share their targets; sums over positives are divided by their number in the batch."""
    stacked = _stacked(output.heads)
    target = targets(output, truth, sizes, stacked.heading_scores.shape[-1])
    positive = target.positive.to(stacked.center.dtype)

    def mean(values: Tensor) -> Tensor:
        return (values * positive).sum((1, 2)) / (positive.sum() + 1e-6)

    residual = _chosen(stacked.heading_residuals_normalized, target.heading_class)
    size_class, size_error = _size_errors(stacked, target, output.mean_sizes)
    return HeadLosses(
        focal(stacked.objectness, target.positive.expand_as(stacked.objectness)).mean((1, 2)),
        mean(_smooth_l1(stacked.center - target.center, settings.center_delta).sum(-1)),
        mean(_cross_entropy(stacked.heading_scores, target.heading_class)),
        mean(_smooth_l1(residual - target.heading_residual, settings.heading_delta)),
        mean(size_class),
        mean(_smooth_l1(size_error, settings.size_delta).sum(-1)),
        mean(_cross_entropy(stacked.class_scores, target.labels)),
    )


def targets(output: GroupFreeOutput, truth: SceneTruth, sizes: Tensor, bins: int) -> Targets:
    """The object of every query is the one that its point lies on: no matching."""
    owner = _object_of(output.seeds.index.gather(1, output.query_index), truth)
    row = torch.where(owner < 0, truth.boxes.shape[1], owner)  # background: the row of zeros behind the last
    box = gather(F.pad(torch.cat([truth.boxes, sizes], -1), (0, 0, 0, 1)), row)
    labels = F.pad(truth.labels, (0, 1)).gather(1, row)
    heading_class, heading_residual = heading_target(box[..., 6], bins)
    return Targets(owner >= 0, box[..., :3], box[..., 7:], heading_class, heading_residual, labels)


def heading_target(yaw: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Our yaw -> Group-Free's heading as the number of its bin and the rest in half bins; bin 0 is centred at 0."""
    width = 2 * math.pi / bins
    turned = torch.remainder(-yaw + width / 2, 2 * math.pi)
    number = (turned / width).long().clamp(max=bins - 1)
    return number, (turned - (number.to(turned.dtype) + 0.5) * width) / (width / 2)


def focal(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss (Lin et al., 2017) element by element; ``labels`` bool."""
    logits = at_least_single(logits)
    wanted = labels.to(logits.dtype)
    wrong = torch.where(labels, -logits, logits).sigmoid()
    weight = torch.where(labels, alpha, 1 - alpha)
    return weight * wrong**gamma * F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")


def _stacked(heads: Sequence[HeadOutput]) -> HeadOutput:
    """Every tensor with an axis of heads in front."""
    parts = [None if of[0] is None else at_least_single(torch.stack(of)) for of in zip(*heads, strict=True)]
    return HeadOutput(*parts)  # type: ignore[arg-type]


def _size_errors(stacked: HeadOutput, target: Targets, means: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the size class ``[L + 1, B, Q]``, and what the size is off by ``[L + 1, B, Q, 3]``."""
    if means is None or stacked.size_scores is None or stacked.size_residuals is None:
        return torch.zeros_like(stacked.objectness), stacked.size - target.size
    index = target.labels[..., None, None].expand(len(stacked.size), -1, -1, -1, 3)
    residual = stacked.size_residuals.gather(-2, index).squeeze(-2)
    return _cross_entropy(stacked.size_scores, target.labels), residual - (target.size / means[target.labels] - 1)


def _object_of(index: Tensor, truth: SceneTruth) -> Tensor:
    """Row of the object that points of the cloud lie on, -1 = background: int64 as ``index``."""
    return truth.point_box.gather(1, index)


def _chosen(values: Tensor, number: Tensor) -> Tensor:
    """``values [L + 1, B, Q, n]`` at ``number [B, Q]``."""
    return values.gather(-1, number[..., None].expand(len(values), -1, -1, 1)).squeeze(-1)


def _cross_entropy(scores: Tensor, number: Tensor) -> Tensor:
    return -_chosen(scores.log_softmax(-1), number)


def _smooth_l1(error: Tensor, delta: float) -> Tensor:
    return F.smooth_l1_loss(error, torch.zeros_like(error), reduction="none", beta=delta)
