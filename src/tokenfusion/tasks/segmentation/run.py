"""What is particular to a segmentation run: how it is trained, judged, and predicts."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from tokenfusion.data.folder import DatasetSpec, Folder
from tokenfusion.data.frames import collate
from tokenfusion.errors import UserError
from tokenfusion.tasks.fusing import exchange_figures
from tokenfusion.tasks.runs import Judged, is_started, settle
from tokenfusion.tasks.segmentation.inference import Evaluation, Result
from tokenfusion.tasks.segmentation.inference import evaluate as evaluate_frames
from tokenfusion.tasks.segmentation.metrics import segmentation_scores
from tokenfusion.tasks.segmentation.model import FusedSegmenter
from tokenfusion.tasks.segmentation.predict import SegmentationPredictor
from tokenfusion.tasks.segmentation.samples import write_samples
from tokenfusion.tasks.segmentation.settings import SegmentationRecipe
from tokenfusion.tasks.segmentation.task import SegmentationTask, build_model, frames, load_pretrained
from tokenfusion.train import Engine, FitResult, fit


def train(recipe: SegmentationRecipe, out: Path, trust: bool = False) -> FitResult:
    """Train into a run folder, or go on from its newest checkpoint."""
    folder = Folder(recipe.data.root)
    if not folder.has_target:
        raise UserError(f"{folder.file}: training needs a target")
    training = frames(recipe, folder, recipe.data.train, True)
    validation = frames(recipe, folder, recipe.data.val, conditions=recipe.evaluation)
    model = build_model(recipe, len(folder.classes), trust)
    model.backbone.check_size(next(iter(validation[0].inputs.values())).shape)  # now, and not after the last step
    if recipe.model.weights is not None and not is_started(out):
        print(load_pretrained(model, recipe.model.weights))
    settle(recipe, folder.spec, out)
    task = SegmentationTask(model, recipe)

    def validate(engine: Engine) -> dict[str, float]:
        result = _judged(task.model, validation, recipe.evaluation, engine)
        return {f"{stream}/{k}": v for stream, figures in _streams(result).items() for k, v in figures.items()}

    return fit(task, training, out, recipe.train, seed=recipe.seed, evaluate=validate, collate=collate)


def _judged(model: FusedSegmenter, validation: Any, protocol: Evaluation, engine: Engine) -> Result:
    classes = len(validation.folder.classes)
    result = evaluate_frames(model, validation, classes, protocol, engine.rank, engine.world)
    return result._replace(confusion={name: engine.sum(matrix) for name, matrix in result.confusion.items()})


def _streams(result: Result) -> dict[str, dict[str, float]]:
    streams = {}
    for name, matrix in result.confusion.items():
        scores = segmentation_scores(matrix)
        streams[name] = {
            "pixel_accuracy": scores.pixel_accuracy,
            "mean_accuracy": scores.mean_accuracy,
            "miou": scores.miou,
        }
    return streams


def modalities_of(recipe: SegmentationRecipe) -> tuple[str, ...]:
    """The modalities whose files a run reads."""
    return recipe.data.modalities


def model_of(recipe: SegmentationRecipe, dataset: DatasetSpec, source: Path, trust: bool) -> FusedSegmenter:
    """A fresh model for the classes of a data set."""
    return build_model(recipe, len(dataset.classes), trust)


def judge(
    model: FusedSegmenter,
    dataset: DatasetSpec,
    recipe: SegmentationRecipe,
    folder: Folder,
    split: str,
    protocol: Evaluation,
    trust: bool,
) -> Judged:
    """Judge a model on a split of a folder."""
    if not folder.has_target:
        raise UserError(f"{folder.file}: evaluation needs a target; predict does without")
    if folder.classes != [entry.name for entry in dataset.classes]:
        raise UserError(f"{folder.file}: has other classes than the data that this run was trained on")
    judged = frames(recipe, folder, split, conditions=protocol)
    result = evaluate_frames(model, judged, len(folder.classes), protocol)
    if not any(matrix.any() for matrix in result.confusion.values()):
        raise UserError(f"{folder.file}: split {split} has no pixel with a class; there is nothing to judge")
    per_class = {name: segmentation_scores(matrix) for name, matrix in result.confusion.items()}
    figures = {
        "images": result.images,
        "protocol": str(protocol),
        "primary": "miou",
        "streams": _streams(result),
        "classes": folder.classes,
        "per_class": {n: {"iou": _list(s.iou), "accuracy": _list(s.accuracy)} for n, s in per_class.items()},
        **exchange_figures(result.rates, model.modalities),
    }
    return Judged(figures, partial(write_samples, model, judged, protocol))


def _list(values: torch.Tensor) -> list[float | None]:
    return [None if v != v else v for v in values.tolist()]


def predictor(model: FusedSegmenter, dataset: DatasetSpec, recipe: SegmentationRecipe) -> SegmentationPredictor:
    """What predicts on one's own files."""
    return SegmentationPredictor(model, dataset, recipe.evaluation, recipe.data.resize)
