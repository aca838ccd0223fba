"""Segmentation on a network of timm: from the recipe's word to predictions, with both heads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tokenfusion import api, load
from tokenfusion.errors import UserError
from tokenfusion.recipe import read_recipe
from tokenfusion.tasks.segmentation.head import LinearHead
from tokenfusion.tasks.segmentation.task import build_model

VIT = [
    "model.backbone={_target_: tokenfusion.backbones.foreign.timm_network, name: test_vit, img_size: [32, 64]}",
    "fuser.init_bias=0.1",
    "data.crop=[32,64]",
    "train.steps=3",
    "train.batch_size=2",
    "train.log_every=1",
    "train.checkpoint_every=3",
]
LINEAR = "model.head={_target_: tokenfusion.tasks.segmentation.head.LinearHead}"


@pytest.fixture(scope="module")
def run(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("foreign") / "run"
    recipe = read_recipe("toy-segmentation", [*VIT, LINEAR, f"data.root={rooms}"])
    api.train(recipe, out)
    return out


def test_it_trains_is_judged_and_predicts(run: Path, rooms: Path, tmp_path: Path) -> None:
    figures = api.evaluate(run)
    assert set(figures["streams"]) == {"rgb", "depth", "ensemble"}
    assert set(figures["exchange"]) == {f"blocks.{i}" for i in range(6)}
    files = {name: rooms / name / f"000000.{end}" for name, end in (("rgb", "jpg"), ("depth", "png"))}
    files = {name: next(path.parent.glob(f"{path.stem}.*")) for name, path in files.items()}
    api.predict(run, tmp_path / "out", files)
    labels = np.asarray(Image.open(tmp_path / "out" / "000000.png"))
    assert labels.shape == (32, 64)
    output = load(run)({"rgb": torch.zeros(1, 3, 32, 64)})
    assert list(output.logits) == ["rgb"]


def test_a_word_names_a_network_and_the_segformer_head_takes_its_maps(rooms: Path) -> None:
    recipe = read_recipe("toy-segmentation", ["model.backbone=timm/test_vit", f"data.root={rooms}"])
    assert recipe.model.backbone == {"_target_": "tokenfusion.backbones.foreign.timm_network", "name": "test_vit"}
    model = build_model(recipe, 5)
    output = model({name: torch.zeros(2, 3, 32, 64) for name in ("rgb", "depth")})
    assert output.ensemble.shape == (2, 5, 2, 4)


def test_the_linear_head_reads_the_last_map_alone() -> None:
    head = LinearHead([4, 6], 3).eval()
    first, last = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4)
    assert torch.equal(head([first, last]), head([first * 2, last]))
    assert head([first, last]).shape == (2, 3, 4, 4)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.backbone=timm/resnet18", "no transformer blocks"),
        ("model.backbone=timm/vit_smal", "did you mean"),
        ("model.frozen=2", "MiT has neither"),
    ],
)
def test_mistakes_are_told_in_one_line(rooms: Path, override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        build_model(read_recipe("toy-segmentation", [override, f"data.root={rooms}"]), 5)
