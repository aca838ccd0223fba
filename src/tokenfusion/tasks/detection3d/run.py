"""The verbs of a detection run: train, evaluate, predict, load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tokenfusion.components import write_text
from tokenfusion.data.folder import DatasetSpec, Folder
from tokenfusion.data.scenes import POINTS, collate_scenes
from tokenfusion.errors import UserError
from tokenfusion.tasks.detection3d.inference import LAST, Result, figures, per_class, primary
from tokenfusion.tasks.detection3d.inference import evaluate as evaluate_scenes
from tokenfusion.tasks.detection3d.metrics import Protocol
from tokenfusion.tasks.detection3d.model import FusedDetector
from tokenfusion.tasks.detection3d.predict import DetectionPredictor, write_samples
from tokenfusion.tasks.detection3d.settings import DetectionRecipe
from tokenfusion.tasks.detection3d.task import DetectionTask, build_model, load_pretrained, scenes
from tokenfusion.tasks.fusing import exchange_figures
from tokenfusion.tasks.runs import (
    device_of,
    is_started,
    judged_folder,
    load_run,
    recorded_dataset,
    save_weights,
    settle,
)
from tokenfusion.train import Engine, FitResult, fit, jsonable


def train(recipe: DetectionRecipe, out: Path, trust: bool = False) -> FitResult:
    """Train into a run folder, or go on from its newest checkpoint; ends with metrics.json and samples."""
    folder = Folder(recipe.data.root)
    classes = _names(folder.spec, folder.file)
    model = build_model(recipe, len(classes), trust)
    training = scenes(recipe, folder, model, recipe.data.train, classes, True)
    validation = scenes(recipe, folder, model, recipe.data.val, classes)
    if not is_started(out):
        for account in load_pretrained(model, recipe):
            print(account)
    _check_classes(folder, out)
    settle(recipe, folder.spec, out)
    task = DetectionTask(model, recipe)

    def judge(engine: Engine) -> dict[str, float]:
        result = _shared(evaluate_scenes(model, validation, recipe.evaluation, engine.rank, engine.world), engine)
        return {f"{head}/{k}": v for head, row in figures(result.runs).items() for k, v in row.items()}

    result = fit(task, training, out, recipe.train, seed=recipe.seed, evaluate=judge, collate=collate_scenes)
    if result.is_first:
        evaluate(out, recipe, None, None, None, "last", trust)
    return result


def _check_classes(folder: Folder, out: Path) -> None:
    """A run that goes on must mean the same by its labels."""
    if is_started(out) and _names(recorded_dataset(out), out) != _names(folder.spec, folder.file):
        raise UserError(f"{out}: this run knows other scene.classes than {folder.name} has now; choose another --out")


def _names(spec: DatasetSpec, source: Path) -> tuple[str, ...]:
    """The classes that a detector finds."""
    if spec.scene is None or not spec.scene.classes:
        raise UserError(f"{source}: has no scene.classes; a detector wants 'scene: {{points: ..., classes: [...]}}'")
    return spec.scene.classes


def _shared(result: Result, engine: Engine) -> Result:
    """What all processes have counted, in each of them."""
    for others in engine.gather(result.runs):
        for run, theirs in zip(result.runs, others, strict=True):
            for head, found in theirs.items():
                run.setdefault(head, found).merge(found.scenes)  # a process may have had no scene
    return result


def load(
    run: Path,
    recipe: DetectionRecipe,
    checkpoint: str = "last",
    trust: bool = False,
    device: str | torch.device = "cpu",
) -> tuple[FusedDetector, DatasetSpec, dict[str, Any]]:
    """The trained model in eval mode, the data set's description and the checkpoint's state."""
    images = [name for name in recipe.data.modalities if name != POINTS]
    file = run / "dataset.yaml"
    return load_run(run, images, lambda spec: build_model(recipe, len(_names(spec, file)), trust), checkpoint, device)


def save(recipe: DetectionRecipe, dataset: DatasetSpec, tensors: Mapping[str, torch.Tensor], out: Path) -> None:
    """Write weights from elsewhere as a run folder."""
    save_weights(build_model(recipe, len(_names(dataset, out))), tensors, recipe, dataset, out)


def evaluate(
    run: Path,
    recipe: DetectionRecipe,
    data: str | Path | None,
    split: str | None,
    protocol: Protocol | None,
    checkpoint: str = "last",
    trust: bool = False,
) -> dict[str, Any]:
    """Judge a run on a split and write ``metrics.json``; on the recipe's own split and protocol ``samples/`` too."""
    model, dataset, state = load(run, recipe, checkpoint, trust, device_of(recipe.train))
    folder = judged_folder(run, recipe.data.root, data)
    is_own = data is None and split in (None, recipe.data.val) and protocol is None and checkpoint == "last"
    split, protocol = split or recipe.data.val, protocol or recipe.evaluation
    judged = scenes(recipe, folder, model, split, _names(dataset, run))
    folder.scene_path(judged.ids[0], "boxes")  # who judges needs them
    result = evaluate_scenes(model, judged, protocol)
    scored = recipe.data.modalities[: 2 if model.both else 1]
    content = {
        "task": "detection3d",
        "dataset": folder.name,
        "split": split,
        "images": len(judged),
        "protocol": f"{protocol}; trained with {recipe.loss.points.gt_size} sizes",
        "primary": primary(protocol),
        "streams": {head: jsonable(row) for head, row in figures(result.runs).items()},
        "classes": judged.classes,
        "per_class": per_class(result.runs, LAST),
        "exchange": exchange_figures(result.rates, scored)["exchange"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "checkpoint": checkpoint,
        "step": state["step"],
    }
    write_text(run / "metrics.json", json.dumps(content, indent=1))
    if is_own:
        write_samples(model, judged, protocol, run / "samples")
    return content


def predict(
    run: Path,
    recipe: DetectionRecipe,
    out: Path,
    files: Mapping[str, str | Path] | None,
    data: str | Path | None,
    split: str | None,
    checkpoint: str = "last",
    trust: bool = False,
) -> list[Path]:
    """Predict on single files or a data set folder; returns the written files."""
    model, dataset, _ = load(run, recipe, checkpoint, trust, device_of(recipe.train))
    return DetectionPredictor(model, dataset, recipe).run(files, data, split, out)
