"""How well boxes are found: average precision and recall over a split, and the protocol behind them.

Per scene, the overlaps of proposals and true boxes are found once, for all classes and thresholds; the sums over scenes
follow at the end, in the order of the scenes' names, so that a figure does not depend on who saw which scene.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from pydantic import Field, field_validator
from torch import Tensor

from tokenfusion.data.boxes import with_hull_sizes
from tokenfusion.data.degrade import POINTS, Conditions
from tokenfusion.tasks.detection3d.iou import iou3d
from tokenfusion.tasks.detection3d.nms import count_inside, nms3d

FEWEST_POINTS = 5  # a box that holds fewer is empty


class Protocol(Conditions):
    """How a model is judged; the same wherever a figure is made.

    Attributes:
        nms_iou: a box is suppressed by a better one of its class whose axis-aligned hull overlaps more than this.
        per_class_proposals: a proposal counts for every class with objectness x probability; otherwise for its most
            probable class alone, with its objectness.
        remove_empty: boxes that hold fewer than five points are dropped before suppression.
        thresholds: a box is found where the IoU exceeds this.
        gt_size: ``exact``, or ``groupfree``: true boxes get the sizes of their axis-aligned hulls, for comparison with
            Group-Free's SUN RGB-D figures only.
        repeats: evaluations with other points drawn from the clouds; figures are their mean.
        missing, degrade: see :class:`~tokenfusion.data.degrade.Conditions`.
    """

    nms_iou: float = Field(0.25, ge=0, le=1)
    per_class_proposals: bool = True
    remove_empty: bool = False
    thresholds: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field((0.25, 0.5), min_length=1)
    gt_size: Literal["exact", "groupfree"] = "exact"
    repeats: int = Field(1, ge=1)

    @field_validator("missing")
    @classmethod
    def _has_points(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if POINTS in names:
            raise ValueError("the detector finds boxes in its points; leave them in")
        return names

    def __str__(self) -> str:
        parts = [f"NMS {self.nms_iou:g}", f"IoU > {', '.join(f'{t:g}' for t in self.thresholds)}"]
        parts += [] if self.per_class_proposals else ["most probable class only"]
        parts += ["without empty boxes"] if self.remove_empty else []
        sizes = "true sizes" if self.gt_size == "exact" else "hull sizes as Group-Free's, not comparable with others"
        runs = [f"mean of {self.repeats} runs"] if self.repeats > 1 else []
        return ", ".join([*parts, sizes, *runs, "batch 1, fp32"]) + self.told()


class Detections(NamedTuple):
    """The proposals of one scene, on the CPU."""

    boxes: Tensor  # float32 [P, 7]
    objectness: Tensor  # float32 [P] in 0..1
    classes: Tensor  # float32 [P, C], probabilities


class DetectionScores(NamedTuple):
    """Percentages; NaN for a class that never occurs as a true box."""

    ap: NDArray[np.float64]  # [thresholds, C]
    recall: NDArray[np.float64]  # [thresholds, C], of all proposals that were kept
    means: dict[str, float]  # map25, ar25, map50, ...: over the classes that occur


class SceneHits(NamedTuple):
    """What one scene adds to the figures."""

    scores: NDArray[np.float32]  # [P, C]; NaN = this proposal does not count for this class
    overlap: NDArray[np.float64]  # [P, C], largest IoU with a true box of the class
    truth: NDArray[np.int64]  # [P, C], row of that box, -1 = there is none
    present: NDArray[np.int64]  # [C] how many true boxes there are


def ensemble(heads: Sequence[Detections]) -> Detections:
    """The proposals of several heads together, before suppression."""
    return Detections(*(torch.cat(column) for column in zip(*heads, strict=True)))


def suppress(detections: Detections, points: Tensor, protocol: Protocol) -> Detections:
    """The proposals that stay after empty boxes are dropped, where asked for, and after suppression; in their order.

    Args:
        points: [N, 3 or more], what the network saw.
    """
    boxes = detections.boxes.numpy()
    rows = np.arange(len(boxes))
    if protocol.remove_empty:
        rows = rows[count_inside(points.numpy(), boxes) >= FEWEST_POINTS]
    labels = detections.classes.argmax(1).numpy()
    kept = nms3d(boxes[rows], detections.objectness.numpy()[rows], labels[rows], protocol.nms_iou)
    stay = torch.from_numpy(np.sort(rows[kept]))
    return Detections(*(column[stay] for column in detections))


def class_scores(detections: Detections, per_class: bool) -> Tensor:
    """The score with which every proposal counts for every class [P, C]; NaN = it does not."""
    if per_class:
        return detections.classes * detections.objectness[:, None]
    best = detections.classes.argmax(1, keepdim=True)
    return torch.full_like(detections.classes, torch.nan).scatter(1, best, detections.objectness[:, None])


class AveragePrecision:
    """Hits and misses over the scenes of a split (VOC's area under the envelope of precision over recall).

    Args:
        classes: how many there are.
        protocol: thresholds, what a proposal counts for, and which sizes true boxes have.
    """

    def __init__(self, classes: int, protocol: Protocol) -> None:
        self.classes, self.protocol = classes, protocol
        self.scenes: dict[str, SceneHits] = {}  # plain arrays, which may travel between processes

    def add(self, detections: Detections, truth_boxes: Tensor, truth_labels: Tensor, scene: str) -> None:
        """One scene, once.

        Args:
            detections: after :func:`suppress`.
            truth_boxes, truth_labels: [K, 7] and [K]; K may be 0.
            scene: its name.

        Raises:
            ValueError: where the scene was added before, or the numbers of classes differ.
        """
        if scene in self.scenes:
            raise ValueError(f"scene {scene} was counted before")
        labels = truth_labels.numpy().astype(np.int64)
        if detections.classes.shape[1] != self.classes or ((labels < 0) | (labels >= self.classes)).any():
            raise ValueError(f"scene {scene}: a class lies outside 0..{self.classes - 1}")
        truth = with_hull_sizes(truth_boxes) if self.protocol.gt_size == "groupfree" else truth_boxes
        overlap, row = _best(iou3d(detections.boxes.numpy(), truth.numpy()), labels, self.classes)
        scores = class_scores(detections, self.protocol.per_class_proposals).numpy()
        self.scenes[scene] = SceneHits(scores, overlap, row, np.bincount(labels, minlength=self.classes))

    def merge(self, scenes: Mapping[str, SceneHits]) -> None:
        """Add what another process has counted: its ``scenes``."""
        self.scenes |= scenes

    def compute(self) -> DetectionScores:
        """The figures over all scenes."""
        thresholds = self.protocol.thresholds
        ap, recall = np.full((2, len(thresholds), self.classes), np.nan)
        if self.scenes:
            hits = _joined([self.scenes[name] for name in sorted(self.scenes)])
            for c in np.flatnonzero(hits.present):
                rows = np.flatnonzero(~np.isnan(hits.scores[:, c]))
                order = rows[np.argsort(-hits.scores[rows, c])]  # equal scores: numpy's own order, as the reference
                for t, threshold in enumerate(thresholds):
                    found = _found(hits.overlap[order, c], hits.truth[order, c], threshold, int(hits.present.sum()))
                    ap[t, c], recall[t, c] = average_precision(found, int(hits.present[c]))
        means: dict[str, float] = {}
        for t, threshold in enumerate(thresholds):
            percent = f"{100 * threshold:g}"
            means |= {f"map{percent}": _mean(100 * ap[t]), f"ar{percent}": _mean(100 * recall[t])}
        return DetectionScores(100 * ap, 100 * recall, means)


def _joined(scenes: Sequence[SceneHits]) -> SceneHits:
    """All scenes as one, whose true boxes are numbered through."""
    first = np.cumsum([0, *(hits.present.sum() for hits in scenes)])
    truth = [np.where(hits.truth < 0, -1, hits.truth + start) for hits, start in zip(scenes, first, strict=False)]
    scores, overlap = (np.concatenate([hits[field] for hits in scenes]) for field in range(2))
    return SceneHits(scores, overlap, np.concatenate(truth), np.sum([hits.present for hits in scenes], 0))


def average_precision(found: NDArray[np.bool_], count: int) -> tuple[float, float]:
    """Area under the envelope of precision over recall, and the last recall.

    Args:
        found: [n] whether a proposal found a true box, by descending score.
        count: how many true boxes there are.
    """
    if not len(found):
        return 0.0, 0.0
    hits = np.cumsum(found, dtype=np.float64)
    recall, precision = hits / count, hits / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    steps = np.diff(recall, prepend=0.0)
    rise = np.flatnonzero(steps)
    return float(np.sum(steps[rise] * envelope[rise])), float(recall[-1])


@njit(cache=True)
def _best(
    iou: NDArray[np.float64], labels: NDArray[np.int64], classes: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """For every proposal and class the true box with the largest overlap, the first of equal ones."""
    overlap = np.zeros((len(iou), classes))
    row = np.full((len(iou), classes), -1)
    for p in range(len(iou)):
        for k in range(len(labels)):
            c = labels[k]
            if row[p, c] < 0 or iou[p, k] > overlap[p, c]:
                overlap[p, c], row[p, c] = iou[p, k], k
    return overlap, row


@njit(cache=True)
def _found(overlap: NDArray[np.float64], truth: NDArray[np.int64], threshold: float, count: int) -> NDArray[np.bool_]:
    """Whether each proposal, best first, is the first to find its true box: IoU above the threshold."""
    used = np.zeros(count, np.bool_)
    found = np.zeros(len(overlap), np.bool_)
    for n in range(len(overlap)):
        if overlap[n] > threshold and not used[truth[n]]:
            found[n] = used[truth[n]] = True
    return found


def _mean(values: NDArray[Any]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else 0.0
