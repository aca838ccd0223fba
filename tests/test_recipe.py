"""Every shipped recipe builds and trains a step; what is wrong is said in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tasks.detection3d.small import SIZES
from tasks.detection3d.small import batch as scenes

from tokenfusion.components import build
from tokenfusion.data.frames import Batch
from tokenfusion.errors import UserError
from tokenfusion.recipe import FUSERS, read_recipe, shipped
from tokenfusion.tasks.detection3d import DetectionTask
from tokenfusion.tasks.detection3d import build_model as build_detector
from tokenfusion.tasks.segmentation import SegmentationTask, build_model
from tokenfusion.tasks.translation import TranslationTask, build_discriminator
from tokenfusion.tasks.translation import build_model as build_translator
from tokenfusion.train import Engine, Optimizers, Task, train_step

SMALLEST = {  # their own depth would take a minute
    "segmentation": [],
    "translation": ["model.generator.variant=xs", "model.discriminator.variant=xs"],
    "detection3d": [
        "model.points.layers=2",
        "model.points.proposals=8",
        *(f"model.points.{k}={v}" for k, v in SIZES.items()),
    ],
}
CLASSES = {"sunrgbd": 10, "scannet": 18, "toy": 9}  # of boxes


def smallest(recipe: Any) -> list[str]:
    """Overrides that leave a recipe's kinds of parts as they are."""
    if recipe.task == "segmentation" and "variant" in recipe.model.backbone:
        return ["model.backbone.variant=b0"]
    has_image = recipe.task == "detection3d" and recipe.model.image is not None
    image = ["model.image.variant=xs", "model.image.init_size=[32, 48]", "model.image.detections=8"]
    return SMALLEST[recipe.task] + (image if has_image else [])


def task_of(recipe: Any, name: str = "toy") -> Task:
    """The task of a recipe, freshly initialised and in training."""
    if recipe.task == "segmentation":
        return SegmentationTask(build_model(recipe, 5), recipe).train()
    if recipe.task == "detection3d":
        return DetectionTask(build_detector(recipe, CLASSES[name.partition("-")[0]]), recipe).train()
    return TranslationTask(build_translator(recipe), build_discriminator(recipe), recipe).train()


def batch_of(recipe: Any) -> Any:
    """Two samples; those of detection are seen by two views, whatever the recipe says."""
    if recipe.task == "detection3d":
        sample = scenes(views=2)
        return sample if "rgb" in recipe.data.modalities else sample._replace(images=None, projection=None)
    image = {m: torch.randn(2, 3, 64, 64) for m in recipe.data.modalities}
    target = torch.randint(0, 5, (2, 64, 64)) if recipe.task == "segmentation" else torch.randn(2, 3, 64, 64).tanh()
    return Batch(["a", "b"], image, target)


@pytest.mark.parametrize("name", list(shipped()))
def test_shipped_recipe_builds_and_takes_a_step(name: str) -> None:
    recipe: Any = read_recipe(name)
    assert recipe.description
    assert recipe.train.steps > 0
    task = task_of(read_recipe(name, smallest(recipe)), name)
    optimizers, engine = Optimizers(task, recipe.train), Engine(1, "32", "cpu")
    optimizers.begin(recipe.train.warmup_steps)
    before = {key: value.detach().clone() for key, value in task.named_parameters()}
    losses, _ = train_step(task, engine, optimizers, [batch_of(recipe)], None, True)
    assert all(value.isfinite() for value in losses.values())
    grouped = [p for phase in task.phases for group in task.parameter_groups(phase) for p in group.params]
    trained = {key: p for key, p in task.named_parameters() if p.requires_grad}
    assert {id(p) for p in grouped} == {id(p) for p in trained.values()}
    assert len(grouped) == len(trained), "each in one group"
    for phase in task.phases:
        own = {id(p) for p in optimizers.params[phase]}
        assert any(not torch.equal(p, before[key]) for key, p in trained.items() if id(p) in own), phase


TABLE_1 = {  # of the paper: inputs -> target; texture = texture edges, edge = occlusion edges
    "shade-texture-to-rgb": (("shade", "edge_texture"), "rgb"),
    "depth-normal-to-rgb": (("depth", "normal"), "rgb"),
    "rgb-shade-to-normal": (("rgb", "shade"), "normal"),
    "rgb-normal-to-shade": (("rgb", "normal"), "shade"),
    "rgb-edge-to-depth": (("rgb", "edge_occlusion"), "depth"),
}
TABLE_7 = {
    "depth-to-rgb": (("depth",), "rgb"),
    "normal-to-rgb": (("normal",), "rgb"),
    "texture-to-rgb": (("edge_texture",), "rgb"),
    "shade-to-rgb": (("shade",), "rgb"),
    "depth-normal-to-rgb": (("depth", "normal"), "rgb"),
    "depth-normal-texture-to-rgb": (("depth", "normal", "edge_texture"), "rgb"),
    "depth-normal-texture-shade-to-rgb": (("depth", "normal", "edge_texture", "shade"), "rgb"),
}


@pytest.mark.parametrize("row", list(TABLE_1 | TABLE_7))
@pytest.mark.parametrize("size", ["ti", "s"])
def test_every_row_of_the_papers_translation_tables_has_its_recipe(row: str, size: str) -> None:
    recipe: Any = read_recipe(f"taskonomy-{row}-{size}")
    modalities, target = (TABLE_1 | TABLE_7)[row]
    assert (recipe.data.modalities, recipe.data.target) == (modalities, target)
    assert recipe.model.generator["variant"] == size
    assert recipe.model.discriminator["variant"] == "ti", "five stages of two layers, whatever the generator"
    assert (recipe.model.score_nets, recipe.model.placement) == ("block", "every")
    assert (recipe.data.enlarge, recipe.data.crop, recipe.data.resize) == ((286, 286), (256, 256), (256, 256))
    loss, train = recipe.loss, recipe.train
    assert (loss.adversarial, loss.l1, loss.sparsity, loss.reduction) == (1, 100, 1e-4, "mean")
    assert (train.lr, train.optimizer, train.betas, train.batch_size) == (2e-4, "adam", (0.5, 0.999), 1)
    assert (train.schedule, train.weight_decay, train.restarts) == ("constant", 0, None)
    assert recipe.evaluation.protocol == "standard"
    fuser = {**FUSERS["tokenfusion"], "rule": "released", "threshold": 0.02}
    assert recipe.fuser == (fuser if len(modalities) > 1 else FUSERS["none"])


def test_no_translation_recipe_is_forgotten() -> None:
    rows = {f"taskonomy-{row}-{size}" for row in TABLE_1 | TABLE_7 for size in ("ti", "s")}
    known = {name for name in shipped() if read_recipe(name).task == "translation"}
    assert known == rows | {"taskonomy-shade-texture-to-rgb-released", "toy-translation"}


def test_the_released_translation_recipe_follows_the_released_code() -> None:
    recipe: Any = read_recipe("taskonomy-shade-texture-to-rgb-released")
    paper: Any = read_recipe("taskonomy-shade-texture-to-rgb-ti")
    assert recipe.model.generator["variant"] == recipe.model.discriminator["variant"] == "b2"
    assert (recipe.model.score_nets, recipe.model.placement) == ("stage", "last")
    assert (recipe.loss.sparsity, recipe.loss.reduction) == (1e-3, "sum")
    assert recipe.evaluation.protocol == "released"
    assert recipe.data == paper.data
    assert recipe.fuser == paper.fuser
    task: Any = task_of(read_recipe("taskonomy-shade-texture-to-rgb-released", SMALLEST["translation"]))
    assert task.model.backbone.block_names() == ["enc1.0", "enc2.0", "enc3.0", "enc4.1", "enc5.1"]
    shade, edges, rgb = (torch.randn(1, 3, 64, 64).tanh() for _ in range(3))
    batch = Batch(["a"], {"shade": shade, "edge_texture": edges}, rgb)
    output = task(batch)
    sparsity = task.losses(batch, output, "generator")["sparsity"]
    torch.testing.assert_close(sparsity, 1e-3 * sum(scores.sum() for scores in output.scores))


def test_released_recipes_follow_the_released_code() -> None:
    recipe = read_recipe("nyudv2-mit-b3-released")
    assert recipe.train.restarts == [6e-5, 3e-5, 1.5e-5]
    assert recipe.train.schedule_steps == 40000
    task = SegmentationTask(
        build_model(read_recipe("nyudv2-mit-b3-released", ["model.backbone.variant=b0"]), 5), recipe
    )
    assert not task.train().model.head.norm.training  # frozen statistics
    assert not task.model.ensemble.alpha.requires_grad
    decays = {group.role: group.weight_decay for group in task.parameter_groups("model")}
    assert decays == {
        "backbone": True,
        "backbone norms": False,
        "fusion": True,
        "fusion norms": True,
        "head": True,
        "head norms": False,
    }


def test_roles_decide_rates_and_decay() -> None:
    recipe = read_recipe("toy-segmentation", ["parameters.head_lr=7", "parameters.fusion_lr=3", "model.alignment=true"])
    groups = {g.role: g for g in SegmentationTask(build_model(recipe, 5), recipe).parameter_groups("model")}
    assert groups["head"].lr_scale == 7
    assert groups["fusion"].lr_scale == 3
    assert groups["backbone"].lr_scale == 1
    assert all(not groups[name].weight_decay for name in groups if "norms" in name or name in ("ensemble", "position"))


@pytest.mark.parametrize("fuser", list(FUSERS))
def test_a_fuser_is_one_word(fuser: str) -> None:
    recipe = read_recipe("toy-segmentation", [f"fuser={fuser}"])
    assert build_model(recipe, 3).modalities == ("rgb", "depth")


def test_overrides_and_base(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("base: nyudv2-mit-b2\nfuser: concat\ntrain: {lr: 1e-3}\n")
    recipe = read_recipe(str(mine), ["train.steps=7", "fuser=average"])
    assert recipe.train.lr == 1e-3
    assert recipe.train.steps == 7
    assert recipe.train.batch_size == 6
    assert recipe.fuser == FUSERS["average"]
    assert read_recipe("toy-segmentation", ["fuser.threshold=0.1"]).fuser["rule"] == "released"
    mine.write_text(f"base: {mine}\n")
    with pytest.raises(UserError, match="back to itself"):
        read_recipe(str(mine))


def test_modalities_dropped_in_training_leave_one() -> None:
    recipe = read_recipe("toy-segmentation", ["data.drop_modality=0.9"])
    task = SegmentationTask(build_model(recipe, 5), recipe).train()
    image = {m: torch.randn(8, 3, 64, 64) for m in ("rgb", "depth")}
    batch = Batch([""] * 8, image, torch.randint(0, 5, (8, 64, 64)))
    output = task(batch)
    assert output.present is not None
    assert output.present.any(0).all()
    assert not output.present.all()
    assert all(torch.isfinite(value) for value in task.losses(batch, output, "model").values())
    assert task.eval()(batch).present is None


def test_unknown_arguments_of_components_are_named() -> None:
    with pytest.raises(UserError, match=r"fuser\.treshold.*did you mean 'threshold'"):
        build({"_target_": "tokenfusion.fusion.TokenFusion", "dim": 8, "modalities": 2, "treshold": 1}, "fuser")
    with pytest.raises(UserError, match="--trust"):
        build({"_target_": "os.getcwd"}, "fuser")
    with pytest.raises(UserError, match="can be imported"):
        build({"_target_": "tokenfusion.fusion.Nothing"}, "fuser")
    with pytest.raises(UserError, match="needs this argument"):
        build({"_target_": "tokenfusion.fusion.TokenFusion"}, "fuser")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.stpes=3", "train.stpes=3: unknown key 'train.stpes'; did you mean 'steps'"),
        ("data.modalities=rgb", "data.modalities=rgb: data.modalities: wanted a list, as [a, b], got 'rgb'"),
        ("data.crop=64", "data.crop=64: data.crop: wanted a list, as [a, b], got 64"),
    ],
)
def test_a_mistake_on_the_command_line_is_not_the_files(override: str, said: str) -> None:
    with pytest.raises(UserError) as raised:
        read_recipe("toy-segmentation", ["train.lr=0.1", override])
    assert str(raised.value).startswith(said)
