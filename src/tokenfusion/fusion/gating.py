"""Features of all streams side by side, each channel behind a gate (self-attention gating)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenfusion.fusion.fusers import Context, Fuser
from tokenfusion.fusion.modality import silenced


class Gating(Fuser):
    """Every stream receives the attention outputs of all streams, concatenated, gated by themselves and brought to C channels.

    Self-supervised model adaptation (SSMA; Valada et al., IJCV 2019) as far as tokens have it: a bottleneck over the
    concatenated channels, ReLU, back to all of them, sigmoid; the gates multiply the concatenation, and a projection brings it
    to the width of one stream. All layers work token by token, where SSMA has 3x3 convolutions. It starts as the mean of the
    streams (ours): gates at 1/2, and a projection that doubles and averages, so that a pretrained network loses nothing more.

    A missing stream stands as zeros, and the sum is over those that are present.

    Args:
        dim, modalities, stage, seed: see :class:`~tokenfusion.fusion.fusers.Fuser`.
        reduction: eta, by which the bottleneck is narrower than the M*C channels.
    """

    def __init__(self, dim: int, modalities: int, stage: int = 0, seed: int = 0, reduction: int = 16) -> None:
        super().__init__(dim, modalities, stage, seed)
        if reduction < 1:
            raise ValueError(f"reduction must be at least 1, not {reduction}")
        width = modalities * dim
        self.squeeze = nn.Linear(width, max(width // reduction, 1))
        self.excite = nn.Linear(max(width // reduction, 1), width)
        self.proj = nn.Linear(width, dim, bias=False)
        with torch.no_grad():
            self.excite.weight.zero_()
            self.excite.bias.zero_()
            self.proj.weight.copy_(2 / modalities * torch.eye(dim).repeat(1, modalities))

    def leave(self, attended: Tensor, scores: Tensor | None, ctx: Context) -> Tensor:
        there = silenced(attended, ctx.present)
        side_by_side = there.movedim(0, 2).flatten(2)  # [B, N, M*C]
        gates = torch.sigmoid(self.excite(torch.relu(self.squeeze(side_by_side))))
        fused = self.proj(side_by_side * gates)
        if ctx.present is not None:  # a mean over fewer
            fused = fused * (self.modalities / ctx.present.sum(0).clamp(min=1)).to(fused.dtype)[:, None, None]
        return fused.expand_as(attended)
