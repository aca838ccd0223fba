"""What races in the bench, by task: the recipe's model, the same streams unfused, and what else it is measured against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenfusion.api import task_package
from tokenfusion.components import TARGET
from tokenfusion.data.scenes import IMAGE, SceneBatch
from tokenfusion.data.truth import SceneTruth
from tokenfusion.errors import UserError, require
from tokenfusion.recipe import fusers, read_recipe
from tokenfusion.tasks.translation.losses import patch_bce
from tokenfusion.train import Engine, Optimizers, train_step

PEER = "transformers"
STEP, RELEASED_STEP = "training step", "released schedule"
SIZES = {"segmentation": (480, 640), "translation": (256, 256)}  # rows, columns where nobody names them
CLASSES, BOXES = 10, 8  # of a detector whose recipe does not say, and in each of its scenes


class Contestant(NamedTuple):
    """One model in the race; ``step`` is what is timed: a forward pass, or training."""

    model: nn.Module
    step: Callable[[], object]


class Race(NamedTuple):
    """Who takes part, and in what."""

    forward: tuple[str, ...]
    memory: tuple[str, ...]  # peaks of one forward and backward pass
    steps: tuple[str, ...]  # whole training steps


def race(recipe: Any) -> Race:
    """The contestants of a recipe's task; transformers' SegFormer only beside a MiT, and where it is installed."""
    if recipe.task == "translation":
        return Race(("fused", "unfused", "fused bf16"), (STEP, RELEASED_STEP), (STEP, RELEASED_STEP))
    if recipe.task == "detection3d":
        return Race(("fused", "unfused", "fused bf16"), ("fused", "unfused"), ())
    is_mit = recipe.model.backbone[TARGET] == "tokenfusion.backbones.mit.mit"
    peer = (PEER,) if is_mit and _has_peer() else ()
    return Race(("fused", "unfused", *peer, "fused bf16"), ("fused", *peer), ())


def contestant(
    recipe_name: str, overrides: list[str], name: str, size: tuple[int, int], batch: int = 1, training: bool = False
) -> Contestant:
    """Build one model with its inputs; the same seed for all."""
    recipe = read_recipe(recipe_name, overrides)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    if name == "unfused":
        recipe = recipe.model_copy(update={"fuser": fusers(recipe.task)["none"]})  # type: ignore[attr-defined]
    if recipe.task == "detection3d":
        return _detection(recipe, name, size, batch, training, device)
    inputs = {m: torch.randn(batch, 3, *size, device=device) for m in recipe.data.modalities}
    make = _translation if recipe.task == "translation" else _segmentation
    return make(recipe, name, inputs, training, device)


def _forward(model: nn.Module, inputs: dict[str, Tensor], name: str) -> Contestant:
    if name == "fused bf16":
        model, inputs = model.bfloat16(), {m: x.bfloat16() for m, x in inputs.items()}
    return Contestant(model, lambda: model(inputs))


def _segmentation(
    recipe: Any, name: str, inputs: dict[str, Tensor], training: bool, device: torch.device
) -> Contestant:
    some = next(iter(inputs.values()))
    target = torch.randint(0, 40, (len(some), *some.shape[-2:]), device=device)
    if name == PEER:
        return _segformer(recipe, inputs, target, training, device)
    package = task_package(recipe.task)
    model = package.build_model(recipe, 40).to(device).train(training)
    if not training:
        return _forward(model, inputs, name)
    task = package.SegmentationTask(model, recipe)
    sample = package.Batch([""] * len(some), inputs, target)

    def step() -> None:
        sum(task.losses(sample, task(sample), "model").values()).backward()

    return Contestant(model, step)


def _segformer(
    recipe: Any, inputs: dict[str, Tensor], target: Tensor, training: bool, device: torch.device
) -> Contestant:
    """transformers' SegFormer of the same size, on one modality after the other; in training both losses, one backward."""
    library = require("transformers", "hf")
    from tokenfusion.backbones.mit import DEPTHS, WIDTHS

    variant = recipe.model.backbone["variant"]
    config = library.SegformerConfig(
        depths=list(DEPTHS[variant]),
        hidden_sizes=list(WIDTHS.get(variant, (64, 128, 320, 512))),
        decoder_hidden_size=recipe.model.head.get("width", 256),
        num_labels=40,
    )
    model = library.SegformerForSemanticSegmentation(config).to(device).train(training)
    if not training:
        return Contestant(model, lambda: [model(x).logits for x in inputs.values()])
    return Contestant(model, lambda: sum(model(x, labels=target).loss for x in inputs.values()).backward())


def _translation(recipe: Any, name: str, inputs: dict[str, Tensor], training: bool, device: torch.device) -> Contestant:
    package = task_package(recipe.task)
    model = package.build_model(recipe).to(device)
    if not training:
        return _forward(model.eval(), inputs, name)
    task = package.TranslationTask(model, package.build_discriminator(recipe).to(device), recipe).train()
    target = torch.randn_like(next(iter(inputs.values()))).tanh()
    batch = package.Batch([""] * len(target), inputs, target)
    optimizers, engine = Optimizers(task, recipe.train), Engine(1, "32", "auto")
    optimizers.begin(0)
    if name == RELEASED_STEP:
        return Contestant(task, lambda: _released_schedule(task, batch, optimizers.optimizers))
    return Contestant(task, lambda: train_step(task, engine, optimizers, [batch], None, False))


def _detection(
    recipe: Any, name: str, size: tuple[int, int], batch: int, training: bool, device: torch.device
) -> Contestant:
    """Drawn points before a camera; what is searched for in a cloud comes along, as from a loader.

    bf16 is autocast, as in training: coordinates keep their digits.
    """
    package, means = task_package(recipe.task), recipe.model.points.get("mean_sizes")
    classes = CLASSES if means is None else len(means)
    model = package.build_model(recipe, classes).to(device).train(training)
    with device:
        scenes = _scenes(recipe.data, size, batch, classes)
    scenes = scenes._replace(index=model.points.indexer()(scenes.points))
    if training:
        task = package.DetectionTask(model, recipe)
        return Contestant(model, lambda: sum(task.losses(scenes, task(scenes), "model").values()).backward())

    def step() -> object:
        with torch.autocast(device.type, torch.bfloat16, enabled=name == "fused bf16"):
            return model(scenes.points, scenes.images, scenes.projection, scenes.index)

    return Contestant(model, step)


def _scenes(data: Any, size: tuple[int, int], batch: int, classes: int) -> SceneBatch:
    """Points in a room of 4 x 4 x 2.5 m, boxes around some of them, images from a camera at its door."""
    points = (torch.rand(batch, data.points, 3) - torch.tensor([0.5, -0.25, 0.5])) * torch.tensor([4, 4, 2.5])
    boxes = torch.cat([points[:, :BOXES], torch.ones(batch, BOXES, 3), torch.zeros(batch, BOXES, 1)], -1)
    labels, owner = torch.randint(classes, (batch, BOXES)), torch.randint(-1, BOXES, (batch, data.points))
    views = data.views if IMAGE in data.modalities else 0
    shown, there = torch.rand(batch, views, BOXES, 4), torch.ones(batch, views, BOXES, dtype=torch.bool)
    truth = SceneTruth(boxes, labels, torch.ones_like(labels, dtype=torch.bool), owner, shown, there)
    if not views:
        return SceneBatch([""] * batch, points, None, None, None, truth)
    (rows, columns), images = size, torch.randn(batch, views, 3, *size)
    camera = torch.tensor([[columns, columns / 2, 0, 0], [0, rows / 2, -columns, 0], [0, 1.0, 0, 0]])
    return SceneBatch([""] * batch, points, None, images, camera.expand(batch, views, 3, 4), truth)


def _released_schedule(task: Any, batch: Any, optimizers: dict[str, torch.optim.Optimizer]) -> None:
    """A step as the released code orders it, with our own modules.

    The generator runs three times, once for nothing; the discriminator sees truth and generated images one after the
    other, its gradient goes back through the generator too, and in the generator's phase it is given a gradient of its own.
    """
    task(batch)
    outputs, critic = task(batch), task.discriminator
    real, generated = (
        critic(batch.inputs, dict.fromkeys(outputs.images, batch.target)),
        critic(batch.inputs, outputs.images),
    )
    optimizers["discriminator"].zero_grad()
    (0.5 * (patch_bce(real, True) + patch_bce(generated, False))).sum().backward()
    optimizers["discriminator"].step()
    outputs = task(batch)
    optimizers["generator"].zero_grad()
    sum(task.losses(batch, outputs, "generator").values()).backward()
    optimizers["generator"].step()


def _has_peer() -> bool:
    try:
        require("transformers", "hf")
    except UserError:
        return False
    return True
