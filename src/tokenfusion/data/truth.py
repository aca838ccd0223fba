"""What stands in a scene: boxes, which point belongs to which, and where the images show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenfusion.data.boxes import contains, project_boxes
from tokenfusion.data.scene_views import Views

EXACT = "donot_use_mm_for_euclid_dist"  # a matrix product is off by millimetres in a room


class SceneTruth(NamedTuple):
    """What stands in the scenes of a batch; that of one scene lacks the first axis.

    K = most boxes of a scene in the batch, 0 where none has any; the rows that others lack are zeros and masked.
    """

    boxes: Tensor  # float32 [B, K, 7], see boxes.py
    labels: Tensor  # int64 [B, K], row of the classes
    mask: Tensor  # bool [B, K]
    point_box: Tensor  # int64 [B, N], row in boxes, -1 = background
    boxes2d: Tensor  # float32 [B, V, K, 4], centre x y, width, height in 0..1 of the image
    mask2d: Tensor  # bool [B, V, K]


def nearest_box(xyz: Tensor, boxes: Tensor) -> Tensor:
    """int64 [N]: of the boxes [K, 7] that contain a point [N, 3] the one with the nearest centre; -1 where none does."""
    if len(boxes) == 0:
        return torch.full((len(xyz),), -1)
    inside = contains(xyz, boxes)
    distance = torch.where(inside, torch.cdist(xyz, boxes[:, :3], compute_mode=EXACT), torch.inf)
    return torch.where(inside.any(1), distance.argmin(1), -1)


def kept_rows(owner: Tensor, kept: Sequence[int], count: int) -> Tensor:
    """Rows of ``count`` boxes -> rows of the ``kept`` ones; -1 stays, and what is not kept becomes it."""
    table = torch.full((count + 1,), -1)  # its last row is what -1 finds
    table[list(kept)] = torch.arange(len(kept))
    return table[owner]


def projected_boxes(boxes: Tensor, views: Views) -> tuple[Tensor, Tensor]:
    """What the views show of boxes [K, 7], as if nothing stood before them: centre and size in 0..1 of the image
    [V, K, 4], and whether anything is shown, bool [V, K].
    """
    size = (views.images.shape[-2], views.images.shape[-1])
    found = [project_boxes(boxes, projection.float(), size) for projection in views.projection]
    corners = [torch.where(visible[:, None], to_unit(shown, size), torch.nan) for shown, visible in found]
    return _centred(torch.stack(corners))


def annotated_boxes(boxes2d: Tensor, views: Views) -> tuple[Tensor, Tensor]:
    """As ``projected_boxes`` from x1 y1 x2 y2 in pixels of the first view's file [K, 4]; NaN: not annotated."""
    corners = torch.full((len(views.images), *boxes2d.shape), torch.nan)
    if views.sizes:
        corners[0] = to_unit(boxes2d, views.sizes[0])
    return _centred(corners)


def to_unit(corners: Tensor, size: Sequence[int]) -> Tensor:
    """x1 y1 x2 y2 in pixels of an image (rows, columns) -> 0..1 of it; pixel 0 spans -0.5 to 0.5."""
    rows, columns = size
    return ((corners + 0.5) / corners.new_tensor([columns, rows, columns, rows])).clamp(0, 1)


def _centred(corners: Tensor) -> tuple[Tensor, Tensor]:
    low, high = corners[..., :2], corners[..., 2:]
    mask = (high > low).all(-1)  # false for NaN, and for what lies outside of the image
    return torch.where(mask[..., None], torch.cat([(low + high) / 2, high - low], -1), 0.0), mask


def stack_truths(truths: Sequence[SceneTruth]) -> SceneTruth:
    """One truth for a batch; boxes are padded to the most that one scene has."""
    most = max(len(truth.boxes) for truth in truths)

    def stack(field: str, behind: int) -> Tensor:
        """Pad the axis that has ``behind`` axes behind it."""
        values = [getattr(truth, field) for truth in truths]
        return torch.stack([F.pad(v, (*(0, 0) * behind, 0, most - v.shape[-1 - behind])) for v in values])

    return SceneTruth(
        boxes=stack("boxes", 1),
        labels=stack("labels", 0),
        mask=stack("mask", 0),
        point_box=torch.stack([truth.point_box for truth in truths]),
        boxes2d=stack("boxes2d", 1),
        mask2d=stack("mask2d", 0),
    )
