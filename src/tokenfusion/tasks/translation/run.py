"""What is particular to a translation run: how it is trained, judged, and makes images."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tokenfusion.data.folder import DatasetSpec, Folder
from tokenfusion.data.frames import collate
from tokenfusion.tasks.fusing import exchange_figures
from tokenfusion.tasks.runs import Judged, is_started, settle
from tokenfusion.tasks.translation.inference import Evaluation, collapsed, extractor_of, figures
from tokenfusion.tasks.translation.inference import evaluate as evaluate_frames
from tokenfusion.tasks.translation.model import FusedTranslator
from tokenfusion.tasks.translation.predict import TranslationPredictor, write_samples
from tokenfusion.tasks.translation.settings import TranslationRecipe
from tokenfusion.tasks.translation.task import (
    TranslationTask,
    build_discriminator,
    build_model,
    frames,
    load_pretrained,
)
from tokenfusion.train import Engine, FitResult, fit, jsonable, warn


def train(recipe: TranslationRecipe, out: Path, trust: bool = False) -> FitResult:
    """Train into a run folder, or go on from its newest checkpoint."""
    folder = Folder(recipe.data.root)
    training = frames(recipe, folder, recipe.data.train, True)
    validation = frames(recipe, folder, recipe.data.val, conditions=recipe.evaluation)
    model, critic = build_model(recipe, trust), build_discriminator(recipe, trust)
    extractor = extractor_of(recipe.evaluation, trust)
    if recipe.model.weights is not None and not is_started(out):
        print(load_pretrained(model, recipe.model.weights))
    settle(recipe, folder.spec, out)
    task = TranslationTask(model, critic, recipe)

    def validate(engine: Engine) -> dict[str, float]:
        result = evaluate_frames(model, validation, recipe.evaluation, extractor, engine.rank, engine.world)
        streams = figures(
            result.added(engine.sum), validation.specs[recipe.data.target], recipe.evaluation, recipe.seed
        )
        if engine.is_first:
            _warn_of_collapse(collapsed(streams))
        return {f"{stream}/{k}": v for stream, row in streams.items() for k, v in row.items()}

    return fit(task, training, out, recipe.train, seed=recipe.seed, evaluate=validate, collate=collate)


def _warn_of_collapse(names: list[str]) -> None:
    if names:
        warn(
            f"the generated images of {', '.join(names)} are constant, or all alike whatever comes in: the generator has"
            " collapsed; lower train.lr, or start from an earlier checkpoint"
        )


def modalities_of(recipe: TranslationRecipe) -> tuple[str, ...]:
    """The modalities whose files a run reads, the target last."""
    return (*recipe.data.modalities, recipe.data.target)


def model_of(recipe: TranslationRecipe, dataset: DatasetSpec, source: Path, trust: bool) -> FusedTranslator:
    """A fresh generator; any data set will do."""
    return build_model(recipe, trust)


def judge(
    model: FusedTranslator,
    dataset: DatasetSpec,
    recipe: TranslationRecipe,
    folder: Folder,
    split: str,
    protocol: Evaluation,
    trust: bool,
) -> Judged:
    """Judge a generator on a split of a folder."""
    judged = frames(recipe, folder, split, conditions=protocol)
    extractor = extractor_of(protocol, trust)
    result = evaluate_frames(model, judged, protocol, extractor)
    streams = figures(result, judged.specs[recipe.data.target], protocol, recipe.seed)
    _warn_of_collapse(collapsed(streams))
    found = {
        "images": len(judged),
        "target": recipe.data.target,
        "protocol": protocol.describe(extractor.name if extractor else None),
        "primary": protocol.primary,
        "streams": {name: jsonable(row) for name, row in streams.items()},
        "collapsed": collapsed(streams),
        **exchange_figures(result.rates, model.modalities),
    }
    return Judged(found, partial(write_samples, model, judged))


def predictor(model: FusedTranslator, dataset: DatasetSpec, recipe: TranslationRecipe) -> TranslationPredictor:
    """What makes images of one's own files."""
    return TranslationPredictor(model, dataset, recipe.data.target, recipe.data.resize)
