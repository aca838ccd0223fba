"""The terms of the two losses: judgements of patches, and L1 over what was measured."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenfusion.tasks.precision import at_least_single


def patch_bce(logits: Tensor, is_real: bool, present: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of the discriminator's patches against "all real" or "all generated", a mean per branch.

    Args:
        logits: ``[M, B, 1, h, w]``.
        present: bool ``[M, B]``; a branch whose input is missing from a sample is not judged there.

    Returns:
        ``[M]`` in float32; 0 for a branch that is missing everywhere.
    """
    logits = at_least_single(logits)
    loss = F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(is_real)), reduction="none")
    return _mean_present(loss.mean((2, 3, 4)), present)


def masked_l1(images: Tensor, target: Tensor, valid: Tensor | None, present: Tensor | None = None) -> Tensor:
    """Mean absolute difference per branch, over measured pixels.

    Args:
        images: ``[M, B, 3, H, W]``.
        target: ``[B, 3, H, W]``.
        valid: bool ``[B, 1, H, W]``; None: all of the target was measured.
        present: bool ``[M, B]``; a branch whose input is missing from a sample is not asked for its image there.

    Returns:
        ``[M]`` in float32.
    """
    difference = (at_least_single(images) - target).abs()
    if valid is None and present is None:
        return difference.mean((1, 2, 3, 4))
    counted = torch.ones_like(difference[:, :, :1], dtype=torch.bool)
    if valid is not None:
        counted = counted & valid
    if present is not None:
        counted = counted & present[:, :, None, None, None]
    total = (difference * counted).sum((1, 2, 3, 4))
    return total / (3 * counted.sum((1, 2, 3, 4))).clamp(min=1)


def _mean_present(values: Tensor, present: Tensor | None) -> Tensor:
    """``[M, B] -> [M]``."""
    if present is None:
        return values.mean(1)
    return (values * present).sum(1) / present.sum(1).clamp(min=1)
