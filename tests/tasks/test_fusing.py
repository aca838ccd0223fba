"""What tasks with a fused backbone share: methods start alike, and lambda can be steered."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from tokenfusion import api
from tokenfusion.components import FUSERS
from tokenfusion.errors import UserError
from tokenfusion.fusion import sparsity_loss
from tokenfusion.recipe import read_recipe
from tokenfusion.tasks.fusing import Sparsity
from tokenfusion.tasks.segmentation.model import FusedSegmenter
from tokenfusion.tasks.segmentation.task import build_model
from tokenfusion.train.checkpoint import load_model

INPUTS = {name: torch.randn(2, 3, 64, 64) for name in ("rgb", "depth")}


def segmenter(*overrides: str) -> tuple[FusedSegmenter, Sparsity]:
    recipe = read_recipe("toy-segmentation", overrides)
    model = build_model(recipe, 5)
    return model, Sparsity(recipe.loss, model.backbone)


@pytest.mark.parametrize("fuser", ["none", "concat", "tokenfusion", "mended"])
def test_whatever_a_fuser_draws_backbone_and_head_start_alike(fuser: str) -> None:
    """So that methods are compared from the same start."""
    wanted = segmenter("fuser=average")[0].state_dict()
    got = segmenter(f"fuser={fuser}")[0].state_dict()
    assert wanted.keys() <= got.keys()
    assert all(torch.equal(value, got[name]) for name, value in wanted.items())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_without_a_target_it_is_the_l1_norm_of_all_scores(reduction: str) -> None:
    model, sparsity = segmenter("loss.sparsity=0.1", f"loss.reduction={reduction}")
    scores = model(INPUTS).scores
    got = sparsity(model.backbone, scores, None)["sparsity"]
    torch.testing.assert_close(got, 0.1 * sparsity_loss(scores, reduction))
    assert sparsity.watch() == {}
    assert sparsity.state_dict() == {}


@pytest.mark.parametrize("fuser", sorted(FUSERS))
def test_a_missing_input_is_taught_nothing(fuser: str) -> None:
    """Statistics of a batch tie its samples together, and each norm of an empty stream lifts a gradient a thousandfold."""
    torch.manual_seed(0)
    model, _ = segmenter(f"fuser={fuser}")
    output = model.train()(INPUTS, torch.tensor([[True, False], [True, True]]))
    (output.logits["rgb"][0].square().mean() + output.logits["depth"].square().mean()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert max(p.grad.abs().max() for p in model.parameters() if p.grad is not None) > 0


def test_nothing_to_press() -> None:
    model, sparsity = segmenter("loss.sparsity=0")
    assert sparsity(model.backbone, model(INPUTS).scores, None) == {}
    model, sparsity = segmenter("fuser=average", "loss.target_rate=0.5")
    assert sparsity(model.backbone, model(INPUTS).scores, None) == {}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("fuser=mended",), "those of MendedFusion do not feel; leave it out"),
        (("loss.reduction=sum",), "steers the factor of a mean"),
        (("fuser.threshold=1",), "at fuser.threshold=1 scores decide nothing"),
        (("fuser.threshold=0",), "at fuser.threshold=0 scores decide nothing"),
    ],
)
def test_what_lambda_has_no_hold_on_is_said(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        segmenter("loss.target_rate=0.5", *overrides)


def test_every_stage_has_its_own_lambda(shake) -> None:
    model, sparsity = segmenter("loss.sparsity=0", "loss.target_rate=0.25")
    scores = shake(model)(INPUTS).scores
    rates = [rate.exchanged.mean() for rate in model.backbone.rates(scores).values()]
    got = sparsity(model.backbone, scores, None)["sparsity"]
    pressure = sparsity.pressure
    expected: Tensor = torch.zeros(())
    for stage in range(4):
        missing = 0.25 - (rates[2 * stage] + rates[2 * stage + 1]) / 2
        norm = sparsity_loss(scores[2 * stage : 2 * stage + 2], "mean")
        expected = expected + (pressure.pull + pressure.gain) * missing * norm
    torch.testing.assert_close(got, expected)
    assert list(sparsity.watch()) == ["lambda/stage1", "lambda/stage2", "lambda/stage3", "lambda/stage4"]


def test_a_run_keeps_its_lambdas(rooms, tmp_path) -> None:
    small = [f"data.root={rooms}", "data.crop=[32, 64]", "train.batch_size=2", "train.log_every=1"]
    recipe = read_recipe("toy-segmentation", [*small, "train.steps=3", "loss.target_rate=0.5"])
    api.train(recipe, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [line["lambda/stage1"] for line in lines if "lambda/stage1" in line]
    kept = load_model(tmp_path / "run", "last")[0]["sparsity.pressure.level"]
    assert len(set(logged)) == 3
    assert kept[0].item() == pytest.approx(logged[-1])
    assert api.load(tmp_path / "run")(INPUTS).scores


def test_scales_are_pressed_where_channels_are_exchanged() -> None:
    model, sparsity = segmenter("fuser=token+channel", "loss.sparsity=0", "loss.scale_sparsity=0.01")
    got = sparsity(model.backbone, model(INPUTS).scores, None)
    assert list(got) == ["scale_sparsity"]
    widths = (32, 32, 64, 64, 160, 160, 256, 256)  # two blocks a stage, two streams, every scale starts at 1
    assert got["scale_sparsity"].item() == pytest.approx(0.01 * 2 * sum(widths))
    model, sparsity = segmenter("fuser=tokenfusion", "loss.sparsity=0", "loss.scale_sparsity=0.01")
    assert sparsity(model.backbone, model(INPUTS).scores, None) == {}
