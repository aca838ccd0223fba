"""The learned ensemble of the streams' predictions."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LearnedEnsemble(nn.Module):
    """A convex combination of the streams: softmax of one learned weight per modality.

    The predictions come in detached: the ensemble's loss trains these weights only (they belong to the optimiser, unlike in
    the released segmentation code), never the streams.

    Args:
        modalities: number of streams M.

    Shape: ``[M, B, ...] -> [B, ...]``; ``present`` bool ``[M, B]`` leaves missing streams out and renormalises. A sample of
    which no stream is present is answered with zeros.
    """

    def __init__(self, modalities: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(modalities))

    def forward(self, predictions: Tensor, present: Tensor | None = None) -> Tensor:
        weight = self.alpha.view(-1, 1).expand(predictions.shape[:2])
        if present is None:
            weight = weight.softmax(0)
        else:
            weight = weight.masked_fill(~present, torch.finfo(weight.dtype).min).softmax(0) * present
        weight = weight.reshape(predictions.shape[:2] + (1,) * (predictions.dim() - 2))
        return (weight * predictions.detach()).sum(0)
