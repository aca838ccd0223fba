"""What is particular to a detection run: how it is trained, judged, and predicts."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tokenfusion.data.folder import DatasetSpec, Folder
from tokenfusion.data.scenes import POINTS, collate_scenes
from tokenfusion.errors import UserError
from tokenfusion.tasks.detection3d.inference import Result, figures, per_class, primary
from tokenfusion.tasks.detection3d.inference import evaluate as evaluate_scenes
from tokenfusion.tasks.detection3d.metrics import Protocol
from tokenfusion.tasks.detection3d.model import FusedDetector
from tokenfusion.tasks.detection3d.predict import DetectionPredictor, write_samples
from tokenfusion.tasks.detection3d.settings import DetectionRecipe
from tokenfusion.tasks.detection3d.task import DetectionTask, build_model, load_pretrained, scenes
from tokenfusion.tasks.fusing import exchange_figures
from tokenfusion.tasks.runs import Judged, is_started, settle
from tokenfusion.train import Engine, FitResult, fit, jsonable


def train(recipe: DetectionRecipe, out: Path, trust: bool = False) -> FitResult:
    """Train into a run folder, or go on from its newest checkpoint."""
    folder = Folder(recipe.data.root)
    classes = _names(folder.spec, folder.file)
    model = build_model(recipe, len(classes), trust)
    training = scenes(recipe, folder, model, recipe.data.train, classes, True)
    validation = scenes(recipe, folder, model, recipe.data.val, classes, conditions=recipe.evaluation)
    if not is_started(out):
        for account in load_pretrained(model, recipe):
            print(account)
    settle(recipe, folder.spec, out)
    task = DetectionTask(model, recipe)

    def validate(engine: Engine) -> dict[str, float]:
        result = _shared(evaluate_scenes(model, validation, recipe.evaluation, engine.rank, engine.world), engine)
        return {f"{head}/{k}": v for head, row in figures(result.runs).items() for k, v in row.items()}

    return fit(task, training, out, recipe.train, seed=recipe.seed, evaluate=validate, collate=collate_scenes)


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


def modalities_of(recipe: DetectionRecipe) -> tuple[str, ...]:
    """The modalities whose image files a run reads."""
    return tuple(name for name in recipe.data.modalities if name != POINTS)


def model_of(recipe: DetectionRecipe, dataset: DatasetSpec, source: Path, trust: bool) -> FusedDetector:
    """A fresh detector for the classes of a data set's boxes; ``source`` is named where it has none."""
    return build_model(recipe, len(_names(dataset, source)), trust)


def judge(
    model: FusedDetector,
    dataset: DatasetSpec,
    recipe: DetectionRecipe,
    folder: Folder,
    split: str,
    protocol: Protocol,
    trust: bool,
) -> Judged:
    """Judge a detector on a split of a folder."""
    judged = scenes(recipe, folder, model, split, _names(dataset, folder.file), conditions=protocol)
    folder.scene_path(judged.ids[0], "boxes")  # who judges needs them
    result = evaluate_scenes(model, judged, protocol)
    found = {
        "images": len(judged),
        "protocol": f"{protocol}; trained with {recipe.loss.points.gt_size} sizes",
        "primary": primary(protocol),
        "streams": {head: jsonable(row) for head, row in figures(result.runs).items()},
        "classes": judged.classes,
        "per_class": per_class(result.runs),
        "exchange": exchange_figures(result.rates, model.exchanging)["exchange"],
    }
    return Judged(found, partial(write_samples, model, judged, protocol))


def predictor(model: FusedDetector, dataset: DatasetSpec, recipe: DetectionRecipe) -> DetectionPredictor:
    """What finds boxes in one's own clouds and images."""
    return DetectionPredictor(model, dataset, recipe)
