"""Residual positional alignment: later layers are told again where a token stands (Sec. 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LearnedPosition(nn.Module):
    """A position embedding for backbones that have none (MiT), learned at the first stage and shared by the aligned streams.

    The paper re-adds the embeddings of the first layer before every later one and stops their gradient there; it does not say
    what a pyramid without embeddings adds. Here one map is learned at the width of the first stage, resampled bicubically to
    the grid of each stage and repeated over the wider stages' channels: no weights behind the stopped gradient, which could
    never learn. It starts at zero: a pretrained network starts as it is.

    Args:
        dim: width of the first stage.
        grid: size of the learned map (rows, columns).
    """

    def __init__(self, dim: int, grid: tuple[int, int] = (15, 20)) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(1, dim, *grid))

    def forward(self, grid: tuple[int, int], dim: int) -> Tensor:
        """The embedding ``[N, C]`` for a stage of this grid and width."""
        position = F.interpolate(self.embedding, size=grid, mode="bicubic", align_corners=False)[0]
        repeats = -(-dim // position.shape[0])
        return position.repeat(repeats, 1, 1)[:dim].flatten(1).transpose(0, 1)
