"""Cross-entropy at label size that never keeps logits of label size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class _UpsampledCrossEntropy(torch.autograd.Function):
    """Takes the gradient at once, sample by sample, and keeps it at the size of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, ignore: int) -> Tensor:
        count = (target != ignore).sum().clamp(min=1)
        wanted = ctx.needs_input_grad[0]
        total = torch.zeros((), device=logits.device, dtype=torch.promote_types(logits.dtype, torch.float32))
        gradient = torch.empty_like(logits, dtype=total.dtype) if wanted else None
        for b in range(logits.shape[0]):
            with torch.set_grad_enabled(wanted), torch.autocast(logits.device.type, enabled=False):
                small = logits[b : b + 1].detach().to(total.dtype).requires_grad_(wanted)
                loss = _summed(small, target[b : b + 1], ignore) / count
            if gradient is not None:
                gradient[b] = torch.autograd.grad(loss, small)[0][0]
            total += loss.detach()
        if gradient is not None:
            ctx.save_for_backward(gradient)
            ctx.dtype = logits.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream).to(ctx.dtype), None, None  # a loss scale acts before rounding


def _summed(logits: Tensor, target: Tensor, ignore: int) -> Tensor:
    full = F.interpolate(logits, size=target.shape[-2:], mode="bilinear", align_corners=False)
    return F.cross_entropy(full, target, ignore_index=ignore, reduction="sum")


def upsampled_cross_entropy(logits: Tensor, target: Tensor, ignore: int = 255) -> Tensor:
    """Mean cross-entropy of bilinearly upsampled logits over the pixels that have a label.

    The full-size logits are the largest tensors of a training step. Here one sample's exist at a time; its gradient is
    taken at once and kept at the logits' own size. It can be differentiated once.

    Args:
        logits: ``[B, K, h, w]``.
        target: int64 ``[B, H, W]``, ``ignore`` = no label. A batch without any label gives 0.
    """
    return _UpsampledCrossEntropy.apply(logits, target, ignore)
