"""The one function behind training's figures, ``eval`` and ``predict``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenfusion.backbones.calls import evaluating
from tokenfusion.backbones.pointnet2 import PointIndices
from tokenfusion.data.scenes import SceneBatch, Scenes, collate_scenes
from tokenfusion.tasks.detection3d.groupfree import GroupFree, GroupFreeOutput
from tokenfusion.tasks.detection3d.metrics import AveragePrecision, Detections, Protocol, ensemble, suppress
from tokenfusion.tasks.detection3d.model import DetectionOutput, FusedDetector
from tokenfusion.tasks.fusing import MeanRates, Rates

LAST, ALL, LAST_THREE = "last", "all_layers", "last_three"


class Seen(NamedTuple):
    """One scene through the model."""

    detections: dict[str, Detections]  # head: before suppression; on the CPU
    output: DetectionOutput
    seeds: Tensor  # int64 [S]: which points of the cloud they are


@torch.inference_mode()
def infer(model: FusedDetector, batch: SceneBatch) -> Seen:
    """A batch of one scene (fp32, eval mode)."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, enabled=False):
        images, projection = (None if x is None else x.to(device) for x in (batch.images, batch.projection))
        index = None if batch.index is None else PointIndices(*(x.to(device) for x in batch.index))
        output = model(batch.points.to(device), images, projection, index)
    heads = decoded(model.points, output.points)
    return Seen(heads, output, output.points.seeds.index[0].cpu())


def decoded(network: GroupFree, output: GroupFreeOutput) -> dict[str, Detections]:
    """The boxes of every head, then of ensembles of heads: ``all_layers`` of all, ``last_three`` of the last three."""
    found = {}
    for name, head in zip(output.names, output.heads, strict=True):
        boxes, objectness = network.boxes(head)[0].float(), head.objectness[0].float().sigmoid()
        found[name] = Detections(boxes.cpu(), objectness.cpu(), head.class_scores[0].float().softmax(-1).cpu())
    heads = list(found.values())
    return {**found, ALL: ensemble(heads), LAST_THREE: ensemble(heads[-3:])}


def primary(protocol: Protocol) -> str:
    """The figure that ranks runs and checkpoints: mean AP at the first threshold."""
    return f"map{100 * protocol.thresholds[0]:g}"


class Result(NamedTuple):
    """What a split gave, run by run; processes add theirs up."""

    runs: list[dict[str, AveragePrecision]]  # per repetition: head -> its hits and misses
    rates: Rates
    scenes: int


def evaluate(model: FusedDetector, scenes: Scenes, protocol: Protocol, rank: int = 0, world: int = 1) -> Result:
    """Judge a split, scene by scene; every process takes each ``world``-th scene, none twice.

    Each repetition draws other points of the clouds: ``protocol.repeats`` of them.
    """
    rates, runs = MeanRates(), []
    indices = range(rank, len(scenes), world)
    with evaluating(model):
        for repetition in range(protocol.repeats):
            scenes.set_epoch(repetition)
            run: dict[str, AveragePrecision] = {}
            for index in indices:
                batch = collate_scenes([scenes[index]])
                assert batch.truth is not None, "evaluation needs boxes"
                truth, labels = batch.truth.boxes[0][batch.truth.mask[0]], batch.truth.labels[0][batch.truth.mask[0]]
                seen = infer(model, batch)
                for head, found in seen.detections.items():
                    kept = suppress(found, batch.points[0, :, :3], protocol)
                    score = run.setdefault(head, AveragePrecision(len(scenes.classes), protocol))
                    score.add(kept, truth, labels, scenes.ids[index])
                rates.add(model.rates(seen.output))
            runs.append(run)
    return Result(runs, rates.means(), len(indices))


def figures(runs: Sequence[Mapping[str, AveragePrecision]]) -> dict[str, dict[str, float]]:
    """Head -> ``map25``, ``ar25``, ... as the mean over the repetitions; with several ``map25_best`` and so on too."""
    table: dict[str, dict[str, float]] = {}
    for head in runs[0]:
        found = [run[head].compute() for run in runs]
        row = {name: sum(f.means[name] for f in found) / len(found) for name in found[0].means}
        if len(found) > 1:
            row |= {f"{name}_best": max(f.means[name] for f in found) for name in row}
        table[head] = row
    return table


def per_class(runs: Sequence[Mapping[str, AveragePrecision]]) -> dict[str, dict[str, list[float | None]]]:
    """Every head's ``ap25``, ``recall25``, ... by class, means over the repetitions; None for a class that does not occur."""
    return {head: _per_class([run[head] for run in runs]) for head in runs[0]}


def _per_class(scores: Sequence[AveragePrecision]) -> dict[str, list[float | None]]:
    found, table = [score.compute() for score in scores], {}
    for row, threshold in enumerate(scores[0].protocol.thresholds):
        for name in ("ap", "recall"):
            values = np.mean([getattr(f, name)[row] for f in found], 0)
            table[f"{name}{100 * threshold:g}"] = [None if np.isnan(v) else float(v) for v in values]
    return table
