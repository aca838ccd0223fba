"""Which tokens are informative: the score networks and the l1 penalty that makes them decide (Eq. 4, 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from tokenfusion.fusion.memory import linears_behind
from tokenfusion.fusion.modality import split

Reduction = Literal["sum", "mean"]


def score_net(dim: int) -> nn.Sequential:
    """LayerNorm, then C -> C -> C/2 -> C/4 -> 2 with GELU between; the two outputs are the logits of keep and replace."""
    return nn.Sequential(
        nn.LayerNorm(dim, eps=1e-5),
        *(nn.Linear(dim, dim), nn.GELU()),
        *(nn.Linear(dim, dim // 2), nn.GELU()),
        *(nn.Linear(dim // 2, dim // 4), nn.GELU()),
        nn.Linear(dim // 4, 2),
    )


class ScorePredictor(nn.Module):
    """``s(e)``: one private score network per modality (the MLP of Sec. 3.2).

    The softmax over the two outputs is evaluated as the sigmoid of their difference, which is the same number.

    Args:
        dim: token width C, at least 4.
        modalities: number of streams M.
        init_bias: bias of the logit "keep minus replace" at the start. ``None`` leaves it at 0: scores start near 0.5, as
            released; 3.0 starts at 0.95, so that pretrained attention is hardly weakened before they have learned.

    Shape: ``[M, B, N, C] -> [M, B, N]`` in 0..1.
    """

    def __init__(self, dim: int, modalities: int, init_bias: float | None = None) -> None:
        super().__init__()
        self.nets = nn.ModuleList(score_net(dim) for _ in range(modalities))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        if init_bias is not None:
            for net in self.nets:
                last = cast("nn.Linear", cast("nn.Sequential", net)[-1])
                nn.init.constant_(last.bias[:1], init_bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.margins(x))

    def margins(self, x: Tensor) -> Tensor:
        """The logits' difference, keep minus replace: scores before their sigmoid."""
        logits = torch.cat([self._logits(net, stream) for net, stream in zip(self.nets, x.unbind(0), strict=True)])
        return split(logits[..., 0] - logits[..., 1], x.shape[0])

    def _logits(self, net: nn.Module, x: Tensor) -> Tensor:
        norm, *layers = cast("nn.Sequential", net)
        return linears_behind(cast("nn.LayerNorm", norm), layers[::2], x, self.training)


def sparsity_loss(scores: Sequence[Tensor], reduction: Reduction) -> Tensor:
    """The l1 norm of all scores, sum over layers and modalities of ``|s|`` (Eq. 5), without its factor lambda.

    Args:
        scores: per fused block ``[M, B, N]``.
        reduction: ``"sum"`` adds every score of the batch, as released: the pressure grows with batch and resolution.
            ``"mean"`` averages over samples and tokens and adds over layers and modalities: it depends on neither.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', not {reduction!r}")
    if not scores:
        return torch.zeros(())
    if reduction == "sum":
        return torch.stack([s.abs().sum() for s in scores]).sum()
    return torch.stack([s.abs().mean((1, 2)).sum() for s in scores]).sum()
