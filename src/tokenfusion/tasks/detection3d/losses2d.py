"""Boxes in images: detection tokens matched with true boxes one to one, and the loss of the matched set (as DETR, YOLOS)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from pydantic import ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

from tokenfusion.backbones.yolos import YolosOutput
from tokenfusion.components import Section
from tokenfusion.tasks.precision import at_least_single

TINY = 1e-9  # area below which a box counts as none


class Loss2dSettings(Section):
    """Factors of the terms, in the matching's cost and in the loss alike; the defaults are the published ones."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    classes: float = Field(1.0, ge=0)
    l1: float = Field(5.0, ge=0)
    giou: float = Field(2.0, ge=0)
    no_object: float = Field(0.1, ge=0)  # weight of the class "no object" in the cross-entropy


class Found2d(NamedTuple):
    """One box for each detection token, in the image's own pixels."""

    scores: Tensor  # [B, D] in 0..1
    classes: Tensor  # int64 [B, D]
    boxes: Tensor  # [B, D, 4]: left, top, right, bottom


def corners(boxes: Tensor) -> Tensor:
    """``[..., 4]``: centre and size -> left, top, right, bottom."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised intersection over union of boxes ``[..., 4]`` as centre and size, in -1..1 (Rezatofighi et al., 2019).

    ``IoU - (hull - union) / hull`` with the smallest box around both as hull; leading dimensions are broadcast.
    """
    first, second = corners(a), corners(b)
    lower, upper = torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:])
    shared = (upper - lower).clamp(min=0).prod(-1)
    union = a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - shared
    lower, upper = torch.minimum(first[..., :2], second[..., :2]), torch.maximum(first[..., 2:], second[..., 2:])
    hull = (upper - lower).prod(-1)
    return shared / union.clamp(min=TINY) - (hull - union) / hull.clamp(min=TINY)


@torch.no_grad()
def match(output: YolosOutput, boxes: Tensor, labels: Tensor, mask: Tensor, settings: Loss2dSettings) -> Tensor:
    """The detection token for each true box that costs least in sum; no token is given twice.

    The cost is ``-classes * p(class) + l1 * |difference| - giou * GIoU``. It is computed where the output is, and brought to
    the processor once.

    Args:
        boxes: ``[B, K, 4]``, centre and size in 0..1.
        labels: int64 ``[B, K]``.
        mask: bool ``[B, K]``, which of them are true boxes.

    Returns:
        int64 ``[B, K]``; -1 where there is no box, or none is left for it.
    """
    from scipy.optimize import linear_sum_assignment  # a slow import

    probability = at_least_single(output.logits).softmax(-1)
    found, wanted = at_least_single(output.boxes).unsqueeze(2), at_least_single(boxes).unsqueeze(1)
    index = labels.clamp(min=0).unsqueeze(1).expand(-1, probability.shape[1], -1)
    cost = settings.l1 * (found - wanted).abs().sum(-1) - settings.giou * giou(found, wanted)
    cost = cost - settings.classes * probability.gather(2, index)
    costs = torch.cat([cost, mask.unsqueeze(1).to(cost.dtype)], 1).cpu().numpy()  # its last row is the mask
    tokens = np.full(mask.shape, -1, np.int64)
    for sample, (matrix, real) in enumerate(zip(costs[:, :-1], costs[:, -1] > 0, strict=True)):
        # a network that diverged still has a matching; its loss then tells what happened
        rows, columns = linear_sum_assignment(np.nan_to_num(matrix[:, real], nan=0.0))
        tokens[sample, np.flatnonzero(real)[columns]] = rows
    return torch.from_numpy(tokens).to(mask.device, non_blocking=True)


def yolos_losses(
    output: YolosOutput,
    boxes: Tensor,
    labels: Tensor,
    mask: Tensor,
    settings: Loss2dSettings,
    present: Tensor | None = None,
) -> dict[str, Tensor]:
    """Cross-entropy of all tokens, L1 and GIoU of the matched ones, each with its factor.

    Boxes are counted over the batch: the two terms of boxes are sums over their number, or 0 where there is none.

    Args:
        boxes, labels, mask: as in :func:`match`; what is not a true box may hold any finite number.
        present: bool ``[B]``, images that are there; None: all of them. Of others neither boxes nor their absence is asked.
    """
    if present is not None:
        mask = mask & present.unsqueeze(1)
    tokens = match(output, boxes, labels, mask, settings)
    matched, count = tokens >= 0, mask.sum().clamp(min=1)
    found = at_least_single(output.boxes).gather(1, tokens.clamp(min=0).unsqueeze(-1).expand(-1, -1, 4))
    l1, overlap = (found - boxes).abs().sum(-1), giou(found, at_least_single(boxes))
    return {
        "classes2d": settings.classes * _class_loss(output.logits, tokens, labels, settings.no_object, present),
        "l1_2d": settings.l1 * torch.where(matched, l1, 0).sum() / count,
        "giou_2d": settings.giou * torch.where(matched, 1 - overlap, 0).sum() / count,
    }


def _class_loss(logits: Tensor, tokens: Tensor, labels: Tensor, no_object: float, present: Tensor | None) -> Tensor:
    """Weighted mean cross-entropy: a token without a box is to say "no object"."""
    batch, detections, none = logits.shape[0], logits.shape[1], logits.shape[2] - 1
    target = labels.new_full((batch, detections + 1), none)  # its last column takes what is not matched
    target = target.scatter(1, torch.where(tokens >= 0, tokens, detections), labels)[:, :-1]
    loss = F.cross_entropy(at_least_single(logits).transpose(1, 2), target, reduction="none")
    weight = torch.ones_like(loss).masked_fill(target == none, no_object)
    if present is not None:
        weight = weight * present.unsqueeze(1)
    return (weight * loss).sum() / weight.sum().clamp(min=TINY)


def postprocess(output: YolosOutput, sizes: Tensor) -> Found2d:
    """The likeliest class of each token, and its box in pixels.

    Args:
        sizes: rows and columns of the images, ``[B, 2]``.
    """
    scores, classes = output.logits.softmax(-1)[..., :-1].max(-1)
    scale = sizes.flip(-1).repeat(1, 2).unsqueeze(1)
    return Found2d(scores, classes, corners(output.boxes) * scale)
