"""Pixel accuracy, mean accuracy and mIoU from an exact confusion matrix of integers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = 255


class SegmentationScores(NamedTuple):
    """Percentages; per-class values are NaN where a class cannot be judged."""

    pixel_accuracy: float
    mean_accuracy: float  # over classes that occur as a label
    miou: float  # over classes that occur as a label or a prediction
    accuracy: Tensor  # [K] float64
    iou: Tensor  # [K] float64


def confusion_matrix(target: Tensor, prediction: Tensor, classes: int, ignore: int = IGNORE) -> Tensor:
    """Counts of (label, prediction) pairs.

    Args:
        target: integers of any shape; ``ignore`` is left out.
        prediction: integers 0..K-1 of the same shape.
        classes: K.

    Returns:
        int64 ``[K, K]``, rows = label, columns = prediction. Matrices of several images or processes add up exactly.
    """
    if target.shape != prediction.shape:
        raise ValueError(f"target {tuple(target.shape)} and prediction {tuple(prediction.shape)} differ in shape")
    valid = target != ignore
    label, guess = target[valid].long(), prediction[valid].long()
    if label.numel() and (max(label.max(), guess.max()) >= classes or min(label.min(), guess.min()) < 0):
        raise ValueError(f"a class id lies outside 0..{classes - 1}")
    return torch.bincount(label * classes + guess, minlength=classes * classes).view(classes, classes)


def segmentation_scores(confusion: Tensor) -> SegmentationScores:
    """All figures of one confusion matrix ``[K, K]``; an empty matrix gives zeros."""
    matrix = confusion.double()
    hit, labelled, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    accuracy = 100 * hit / labelled  # 0 / 0 = NaN: never a label
    iou = 100 * hit / (labelled + predicted - hit)
    total = matrix.sum()
    pixel = 100 * hit.sum() / total if total > 0 else total
    return SegmentationScores(float(pixel), _mean(accuracy), _mean(iou), accuracy, iou)


def _mean(values: Tensor) -> float:
    value = float(values.nanmean())
    return 0.0 if value != value else value
