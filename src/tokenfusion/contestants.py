"""What races in the bench, by task: the recipe's model, the same streams unfused, and what else it is measured against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenfusion.api import task_package
from tokenfusion.components import TARGET
from tokenfusion.errors import UserError, require
from tokenfusion.recipe import read_recipe
from tokenfusion.tasks.translation.losses import patch_bce
from tokenfusion.train import Engine, Optimizers, train_step

NO_FUSION = {TARGET: "tokenfusion.fusion.NoFusion"}
PEER = "transformers"
STEP, RELEASED_STEP = "training step", "released schedule"
SIZES = {"segmentation": (480, 640), "translation": (256, 256)}  # rows, columns where the caller names none


class Contestant(NamedTuple):
    """One model in the race; ``step`` is what is timed: a forward pass, or training."""

    model: nn.Module
    step: Callable[[], object]


class Race(NamedTuple):
    """Who takes part, and in what."""

    forward: tuple[str, ...]
    memory: tuple[str, ...]  # peaks of one forward and backward pass
    steps: tuple[str, ...]  # whole training steps


def race(task: str) -> Race:
    """The contestants of a task; transformers only where it is installed."""
    if task == "translation":
        return Race(("fused", "unfused", "fused bf16"), (STEP, RELEASED_STEP), (STEP, RELEASED_STEP))
    peer = (PEER,) if _has_peer() else ()
    return Race(("fused", "unfused", *peer, "fused bf16"), ("fused", *peer), ())


def contestant(
    recipe_name: str, overrides: list[str], name: str, size: tuple[int, int], batch: int = 1, training: bool = False
) -> Contestant:
    """Build one model with its inputs; the same seed for all."""
    recipe = read_recipe(recipe_name, overrides)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    inputs = {m: torch.randn(batch, 3, *size, device=device) for m in recipe.data.modalities}
    if name == "unfused":
        recipe = recipe.model_copy(update={"fuser": NO_FUSION})  # type: ignore[attr-defined]
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
