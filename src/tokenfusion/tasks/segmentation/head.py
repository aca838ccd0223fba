"""Heads: one linear layer, or the all-MLP head of SegFormer, its linear layers applied where the maps are small."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F


class LinearHead(nn.Module):
    """Batch norm and one linear layer on the last map: what a frozen or short training is judged with (DINOv2).

    Args:
        dims: channels of the stages.
        classes: K.
        dropout: Dropout2d before the classifier.

    Shape: maps ``[B, C_s, H_s, W_s] -> [B, K, H_S, W_S]``.
    """

    def __init__(self, dims: Sequence[int], classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dims[-1])
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(dims[-1], classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.classify(self.dropout(self.norm(maps[-1])))


class SegFormerHead(nn.Module):
    """Projects every stage to one width, brings it to the first stage's size, fuses and classifies.

    The reference upsamples, concatenates (stages 4, 3, 2, 1) and applies a 1x1 convolution. Linear maps and bilinear
    upsampling commute and compose, so here each stage is multiplied by (its slice of the fuse matrix) x (its projection) at
    its own resolution and the results are added up: the same numbers, without the concatenated map at 1/4 size.

    Args:
        dims: channels of the stages.
        classes: K.
        width: 256 as released (SegFormer's B2-B5 use 768).
        dropout: Dropout2d before the classifier.

    Shape: maps ``[B, C_s, H_s, W_s] -> [B, K, H_1, W_1]``, with MiT 1/4 of the image.
    """

    def __init__(self, dims: Sequence[int], classes: int, width: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(dim, width) for dim in dims)
        self.fuse = nn.Linear(len(dims) * width, width, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        # the concatenation runs from the last stage to the first
        slices = self.fuse.weight.chunk(len(maps), dim=1)[::-1]
        fused: Tensor | None = None
        for x, projection, part in zip(maps, self.projections, slices, strict=True):
            linear = cast("nn.Linear", projection)
            x = F.conv2d(x, (part @ linear.weight)[..., None, None], part @ linear.bias)
            if fused is None:
                fused = x
            else:
                fused = fused + F.interpolate(x, size=fused.shape[2:], mode="bilinear", align_corners=False)
        assert fused is not None, "a pyramid has at least one stage"
        return self.classify(self.dropout(F.relu(self.norm(fused))))
