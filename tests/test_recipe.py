"""Every shipped recipe builds and trains a step; what is wrong is said in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tokenfusion.components import build
from tokenfusion.data.frames import Batch
from tokenfusion.errors import UserError
from tokenfusion.recipe import FUSERS, read_recipe, shipped
from tokenfusion.tasks.segmentation import SegmentationTask, build_model


@pytest.mark.parametrize("name", list(shipped()))
def test_shipped_recipe_builds_and_takes_a_step(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.description
    assert recipe.train.steps > 0
    small = read_recipe(name, ["model.backbone.variant=b0"])  # its own depth would take a minute
    task = SegmentationTask(build_model(small, 5), small).train()
    image = {m: torch.randn(2, 3, 64, 64) for m in recipe.data.modalities}
    batch = Batch(["a", "b"], image, torch.randint(0, 5, (2, 64, 64)))
    losses = task.losses(batch, task(batch), "model")
    sum(losses.values()).backward()
    grouped = [p for group in task.parameter_groups("model") for p in group.params]
    assert {id(p) for p in grouped} == {id(p) for p in task.parameters() if p.requires_grad}
    assert len(grouped) == len({id(p) for p in grouped})


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
