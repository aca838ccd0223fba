"""The verbs of a segmentation run: train, evaluate, predict, load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from tokenfusion.components import read_yaml, write_text
from tokenfusion.data.augment import collate
from tokenfusion.data.folder import DatasetSpec, Folder
from tokenfusion.errors import UserError
from tokenfusion.tasks.segmentation.inference import MULTI_SCALE, Evaluation, Result
from tokenfusion.tasks.segmentation.inference import evaluate as evaluate_frames
from tokenfusion.tasks.segmentation.metrics import segmentation_scores
from tokenfusion.tasks.segmentation.model import FusedSegmenter
from tokenfusion.tasks.segmentation.predict import Predictor
from tokenfusion.tasks.segmentation.samples import write_samples
from tokenfusion.tasks.segmentation.settings import SegmentationRecipe
from tokenfusion.tasks.segmentation.task import SegmentationTask, build_model, frames, load_pretrained
from tokenfusion.train import WITHOUT_EFFECT_ON_WEIGHTS, Checkpoints, Engine, FitResult, fit, load_model

# what may change when a run goes on
MAY_CHANGE = {("data", "root"), ("description",), ("train", "steps")} | {
    ("train", key) for key in WITHOUT_EFFECT_ON_WEIGHTS
}
SAMPLES = 6


def train(recipe: SegmentationRecipe, out: Path, trust: bool = False) -> FitResult:
    """Train into a run folder, or go on from its newest checkpoint; ends with metrics.json and samples."""
    folder = Folder(recipe.data.root)
    if not folder.has_target:
        raise UserError(f"{folder.file}: training needs a target")
    training, validation = frames(recipe, folder, recipe.data.train, True), frames(recipe, folder, recipe.data.val)
    model = build_model(recipe, len(folder.classes), trust)
    model.backbone.check_size(next(iter(validation[0].inputs.values())).shape)  # now, and not after the last step
    if any((out / "checkpoints").glob("step-*")):
        _check_same(recipe, folder.spec, out)
    elif recipe.model.weights is not None:
        print(load_pretrained(model, recipe.model.weights))
    _settle(recipe, folder.spec, out)
    task = SegmentationTask(model, recipe)

    def judge(engine: Engine) -> dict[str, float]:
        result = _judged(task.model, validation, recipe.evaluation, engine)
        return {f"{stream}/{k}": v for stream, figures in _streams(result).items() for k, v in figures.items()}

    result = fit(task, training, out, recipe.train, seed=recipe.seed, evaluate=judge, collate=collate)
    if result.is_first:
        evaluate(out, recipe, None, None, False, "last", trust)
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


def _check_same(recipe: SegmentationRecipe, dataset: DatasetSpec, out: Path) -> None:
    """A run goes on only with its own recipe and classes."""
    old = read_yaml(out / "recipe.yaml", SegmentationRecipe).model_dump(mode="json")
    different = [key for key in _differences(old, recipe.model_dump(mode="json")) if key not in MAY_CHANGE]
    if different:
        keys = ", ".join(".".join(key) for key in different[:5])
        raise UserError(f"{out}: holds a run of another recipe (different: {keys}); choose another --out")
    if [entry.name for entry in _dataset(out).classes] != [entry.name for entry in dataset.classes]:
        raise UserError(f"{out}: this run knows other classes than {dataset.name} has now; choose another --out")


def _settle(recipe: SegmentationRecipe, dataset: DatasetSpec, out: Path) -> None:
    """Write recipe.yaml and dataset.yaml."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write(out / "recipe.yaml", recipe.model_dump(mode="json"))
        _write(out / "dataset.yaml", dataset.model_dump(mode="json", exclude_unset=True))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None


def _write(file: Path, content: Mapping[str, Any]) -> None:
    """Only where it says something new: of several processes the first has written it."""
    text = yaml.safe_dump(content, sort_keys=False)
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        write_text(file, text)


def _differences(old: Any, new: Any, place: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [d for key in keys for d in _differences(old.get(key), new.get(key), (*place, key))]
    return [] if old == new else [place]


def load(
    run: Path,
    recipe: SegmentationRecipe,
    checkpoint: str = "last",
    trust: bool = False,
    device: str | torch.device = "cpu",
) -> tuple[FusedSegmenter, DatasetSpec, dict[str, Any]]:
    """The trained model in eval mode, the data set's description and the checkpoint's state."""
    dataset = _dataset(run)
    missing = [name for name in recipe.data.modalities if name not in dataset.modalities]
    if missing:
        raise UserError(f"{run / 'dataset.yaml'}: has no modality {missing[0]!r}, which recipe.yaml names")
    model = build_model(recipe, len(dataset.classes), trust)
    if checkpoint not in ("last", "best"):
        raise UserError(f"--checkpoint is {checkpoint!r}; wanted last or best")
    tensors, state = load_model(run, "best" if checkpoint == "best" else "last")
    try:
        model.load_state_dict({name.removeprefix("model."): value for name, value in tensors.items()})
    except RuntimeError as error:
        raise UserError(
            f"{run}: the checkpoint does not fit recipe.yaml ({str(error).splitlines()[1].strip()})"
        ) from None
    return model.to(device).eval(), dataset, state


def _device(recipe: SegmentationRecipe) -> str:
    """Where training judged the model too."""
    return "cuda" if recipe.train.accelerator != "cpu" and torch.cuda.is_available() else "cpu"


def save(recipe: SegmentationRecipe, dataset: DatasetSpec, tensors: Mapping[str, torch.Tensor], out: Path) -> None:
    """Write weights from elsewhere as a run folder.

    Raises:
        UserError: where they are not the whole of the recipe's model.
    """
    model = build_model(recipe, len(dataset.classes))
    try:
        model.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise UserError(f"the weights do not fit the model: {str(error).splitlines()[1].strip()}") from None
    _settle(recipe, dataset, out)
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    Checkpoints(out).save(0, weights, {}, {"step": 0})


def _dataset(run: Path) -> DatasetSpec:
    return read_yaml(run / "dataset.yaml", DatasetSpec)


def evaluate(
    run: Path,
    recipe: SegmentationRecipe,
    data: str | Path | None,
    split: str | None,
    multi_scale: bool,
    checkpoint: str = "last",
    trust: bool = False,
) -> dict[str, Any]:
    """Judge a run on a split and write ``metrics.json``; on the recipe's own split ``samples/`` too."""
    model, dataset, state = load(run, recipe, checkpoint, trust, _device(recipe))
    if data is None and not Path(recipe.data.root).exists():
        raise UserError(
            f"{run / 'recipe.yaml'}: data.root {recipe.data.root} is not found from here; say --data FOLDER"
        )
    folder = Folder(data or recipe.data.root)
    if not folder.has_target:
        raise UserError(f"{folder.file}: evaluation needs a target; predict does without")
    if folder.classes != [entry.name for entry in dataset.classes]:
        raise UserError(f"{folder.file}: has other classes than the data that this run was trained on")
    is_own = data is None and split in (None, recipe.data.val) and not multi_scale and checkpoint == "last"
    split = split or recipe.data.val
    protocol = recipe.evaluation.model_copy(update=MULTI_SCALE) if multi_scale else recipe.evaluation
    judged = frames(recipe, folder, split)
    result = evaluate_frames(model, judged, len(folder.classes), protocol)
    per_class = {name: segmentation_scores(matrix) for name, matrix in result.confusion.items()}
    content = {
        "task": "segmentation",
        "dataset": folder.name,
        "split": split,
        "images": result.images,
        "protocol": str(protocol),
        "streams": _streams(result),
        "classes": folder.classes,
        "per_class": {n: {"iou": _list(s.iou), "accuracy": _list(s.accuracy)} for n, s in per_class.items()},
        "exchange": _by_modality(model, result, 0),
        "donor_below": _by_modality(model, result, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "checkpoint": checkpoint,
        "step": state["step"],
    }
    write_text(run / "metrics.json", json.dumps(content, indent=1))
    if is_own:
        write_samples(model, judged, protocol, run / "samples", SAMPLES)
    return content


def _list(values: torch.Tensor) -> list[float | None]:
    return [None if v != v else v for v in values.tolist()]


def _by_modality(model: FusedSegmenter, result: Result, which: int) -> dict[str, dict[str, float]]:
    return {
        block: dict(zip(model.modalities, rates[which].tolist(), strict=True)) for block, rates in result.rates.items()
    }


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
    if (files is None) == (data is None):
        raise UserError("predict wants either files (rgb=a.jpg depth=a.png) or --data FOLDER")
    if files is not None and split is not None:
        raise UserError("--split belongs to --data; single files have none")
    model, dataset, _ = load(run, recipe, checkpoint, trust, _device(recipe))
    predictor = Predictor(model, dataset, recipe.evaluation, recipe.data.resize)
    if files is not None:
        return predictor.files({name: Path(path) for name, path in files.items()}, out)
    assert data is not None
    return predictor.folder(Folder(data), split, out)
