"""The verbs of a segmentation run: train, evaluate, predict, load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tokenfusion.components import write_text
from tokenfusion.data.folder import DatasetSpec, Folder
from tokenfusion.data.frames import collate
from tokenfusion.errors import UserError
from tokenfusion.tasks.fusing import exchange_figures
from tokenfusion.tasks.runs import (
    device_of,
    is_started,
    judged_folder,
    load_run,
    save_weights,
    settle,
)
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
    """Train into a run folder, or go on from its newest checkpoint; ends with metrics.json and samples."""
    folder = Folder(recipe.data.root)
    if not folder.has_target:
        raise UserError(f"{folder.file}: training needs a target")
    training, validation = frames(recipe, folder, recipe.data.train, True), frames(recipe, folder, recipe.data.val)
    model = build_model(recipe, len(folder.classes), trust)
    model.backbone.check_size(next(iter(validation[0].inputs.values())).shape)  # now, and not after the last step
    if recipe.model.weights is not None and not is_started(out):
        print(load_pretrained(model, recipe.model.weights))
    settle(recipe, folder.spec, out)
    task = SegmentationTask(model, recipe)

    def judge(engine: Engine) -> dict[str, float]:
        result = _judged(task.model, validation, recipe.evaluation, engine)
        return {f"{stream}/{k}": v for stream, figures in _streams(result).items() for k, v in figures.items()}

    result = fit(task, training, out, recipe.train, seed=recipe.seed, evaluate=judge, collate=collate)
    if result.is_first:
        evaluate(out, recipe, None, None, None, "last", trust)
    return result


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


def load(
    run: Path,
    recipe: SegmentationRecipe,
    checkpoint: str = "last",
    trust: bool = False,
    device: str | torch.device = "cpu",
) -> tuple[FusedSegmenter, DatasetSpec, dict[str, Any]]:
    """The trained model in eval mode, the data set's description and the checkpoint's state."""
    return load_run(
        run,
        recipe.data.modalities,
        lambda dataset: build_model(recipe, len(dataset.classes), trust),
        checkpoint,
        device,
    )


def save(recipe: SegmentationRecipe, dataset: DatasetSpec, tensors: Mapping[str, torch.Tensor], out: Path) -> None:
    """Write weights from elsewhere as a run folder."""
    save_weights(build_model(recipe, len(dataset.classes)), tensors, recipe, dataset, out)


def evaluate(
    run: Path,
    recipe: SegmentationRecipe,
    data: str | Path | None,
    split: str | None,
    protocol: Evaluation | None,
    checkpoint: str = "last",
    trust: bool = False,
) -> dict[str, Any]:
    """Judge a run on a split and write ``metrics.json``; on the recipe's own split ``samples/`` too."""
    model, dataset, state = load(run, recipe, checkpoint, trust, device_of(recipe.train))
    folder = judged_folder(run, recipe.data.root, data)
    if not folder.has_target:
        raise UserError(f"{folder.file}: evaluation needs a target; predict does without")
    if folder.classes != [entry.name for entry in dataset.classes]:
        raise UserError(f"{folder.file}: has other classes than the data that this run was trained on")
    is_own = data is None and split in (None, recipe.data.val) and protocol is None and checkpoint == "last"
    split, protocol = split or recipe.data.val, protocol or recipe.evaluation
    judged = frames(recipe, folder, split)
    result = evaluate_frames(model, judged, len(folder.classes), protocol)
    per_class = {name: segmentation_scores(matrix) for name, matrix in result.confusion.items()}
    content = {
        "task": "segmentation",
        "dataset": folder.name,
        "split": split,
        "images": result.images,
        "protocol": str(protocol),
        "primary": "miou",
        "streams": _streams(result),
        "classes": folder.classes,
        "per_class": {n: {"iou": _list(s.iou), "accuracy": _list(s.accuracy)} for n, s in per_class.items()},
        **exchange_figures(result.rates, model.modalities),
        "parameters": sum(p.numel() for p in model.parameters()),
        "checkpoint": checkpoint,
        "step": state["step"],
    }
    write_text(run / "metrics.json", json.dumps(content, indent=1))
    if is_own:
        write_samples(model, judged, protocol, run / "samples")
    return content


def _list(values: torch.Tensor) -> list[float | None]:
    return [None if v != v else v for v in values.tolist()]


def predict(
    run: Path,
    recipe: SegmentationRecipe,
    out: Path,
    files: Mapping[str, str | Path] | None,
    data: str | Path | None,
    split: str | None,
    checkpoint: str = "last",
    trust: bool = False,
) -> list[Path]:
    """Predict on single files or a data set folder; returns the written files."""
    model, dataset, _ = load(run, recipe, checkpoint, trust, device_of(recipe.train))
    predictor = SegmentationPredictor(model, dataset, recipe.evaluation, recipe.data.resize)
    return predictor.run(files, data, split, out)
