"""The verbs of a translation run: train, evaluate, predict, load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tokenfusion.components import write_text
from tokenfusion.data.folder import DatasetSpec, Folder
from tokenfusion.data.frames import collate
from tokenfusion.tasks.fusing import exchange_figures
from tokenfusion.tasks.runs import (
    device_of,
    is_started,
    judged_folder,
    load_run,
    save_weights,
    settle,
)
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
    """Train into a run folder, or go on from its newest checkpoint; ends with metrics.json and samples."""
    folder = Folder(recipe.data.root)
    training, validation = frames(recipe, folder, recipe.data.train, True), frames(recipe, folder, recipe.data.val)
    model, critic = build_model(recipe, trust), build_discriminator(recipe, trust)
    extractor = extractor_of(recipe.evaluation, trust)
    if recipe.model.weights is not None and not is_started(out):
        print(load_pretrained(model, recipe.model.weights))
    settle(recipe, folder.spec, out)
    task = TranslationTask(model, critic, recipe)

    def judge(engine: Engine) -> dict[str, float]:
        result = evaluate_frames(model, validation, recipe.evaluation, extractor, engine.rank, engine.world)
        streams = figures(
            result.added(engine.sum), validation.specs[recipe.data.target], recipe.evaluation, recipe.seed
        )
        if engine.is_first:
            _warn_of_collapse(collapsed(streams))
        return {f"{stream}/{k}": v for stream, row in streams.items() for k, v in row.items()}

    result = fit(task, training, out, recipe.train, seed=recipe.seed, evaluate=judge, collate=collate)
    if result.is_first:
        evaluate(out, recipe, None, None, None, "last", trust)
    return result


def _warn_of_collapse(names: list[str]) -> None:
    if names:
        warn(
            f"the generated images of {', '.join(names)} are constant, or all alike whatever comes in: the generator has"
            " collapsed; lower train.lr, or start from an earlier checkpoint"
        )


def load(
    run: Path,
    recipe: TranslationRecipe,
    checkpoint: str = "last",
    trust: bool = False,
    device: str | torch.device = "cpu",
) -> tuple[FusedTranslator, DatasetSpec, dict[str, Any]]:
    """The trained generator in eval mode, the data set's description and the checkpoint's state."""
    return load_run(
        run, (*recipe.data.modalities, recipe.data.target), lambda _: build_model(recipe, trust), checkpoint, device
    )


def save(recipe: TranslationRecipe, dataset: DatasetSpec, tensors: Mapping[str, torch.Tensor], out: Path) -> None:
    """Write a generator's weights from elsewhere as a run folder."""
    save_weights(build_model(recipe), tensors, recipe, dataset, out)


def evaluate(
    run: Path,
    recipe: TranslationRecipe,
    data: str | Path | None,
    split: str | None,
    protocol: Evaluation | None,
    checkpoint: str = "last",
    trust: bool = False,
) -> dict[str, Any]:
    """Judge a run on a split and write ``metrics.json``; on the recipe's own split and protocol ``samples/`` too."""
    model, _, state = load(run, recipe, checkpoint, trust, device_of(recipe.train))
    folder = judged_folder(run, recipe.data.root, data)
    is_own = data is None and split in (None, recipe.data.val) and protocol is None and checkpoint == "last"
    split, protocol = split or recipe.data.val, protocol or recipe.evaluation
    judged = frames(recipe, folder, split)
    extractor = extractor_of(protocol, trust)
    result = evaluate_frames(model, judged, protocol, extractor)
    streams = figures(result, judged.specs[recipe.data.target], protocol, recipe.seed)
    content = {
        "task": "translation",
        "dataset": folder.name,
        "split": split,
        "images": len(judged),
        "target": recipe.data.target,
        "protocol": protocol.describe(extractor.name if extractor else None),
        "primary": protocol.primary,
        "streams": {name: jsonable(row) for name, row in streams.items()},
        "collapsed": collapsed(streams),
        **exchange_figures(result.rates, model.modalities),
        "parameters": sum(p.numel() for p in model.parameters()),
        "checkpoint": checkpoint,
        "step": state["step"],
    }
    _warn_of_collapse(collapsed(streams))
    write_text(run / "metrics.json", json.dumps(content, indent=1))
    if is_own:
        write_samples(model, judged, run / "samples")
    return content


def predict(
    run: Path,
    recipe: TranslationRecipe,
    out: Path,
    files: Mapping[str, str | Path] | None,
    data: str | Path | None,
    split: str | None,
    checkpoint: str = "last",
    trust: bool = False,
) -> list[Path]:
    """Predict on single files or a data set folder; returns the written files."""
    model, dataset, _ = load(run, recipe, checkpoint, trust, device_of(recipe.train))
    predictor = TranslationPredictor(model, dataset, recipe.data.target, recipe.data.resize)
    return predictor.run(files, data, split, out)
