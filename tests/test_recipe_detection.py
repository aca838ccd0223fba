"""Detection recipes have the published numbers, and words of their own for how streams exchange tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tasks.detection3d.small import OVERRIDES

from tokenfusion.errors import UserError
from tokenfusion.recipe import read_recipe, shipped
from tokenfusion.tasks.detection3d import FUSERS, build_model

DETECTION = {  # classes, layers, proposals, width, image's network; scenes of training
    "sunrgbd-l6-o256": (10, 6, 256, 1, None),
    "sunrgbd-l6-o256-ti": (10, 6, 256, 1, "ti"),
    "sunrgbd-l6-o256-s": (10, 6, 256, 1, "s"),
    "scannet-l6-o256": (18, 6, 256, 1, None),
    "scannet-l6-o256-ti": (18, 6, 256, 1, "ti"),
    "scannet-l12-o512": (18, 12, 512, 2, None),
    "scannet-l12-o512-s": (18, 12, 512, 2, "s"),
}
SCENES = {"sunrgbd": 5285, "scannet": 1201}  # of training
# Group-Free's table: deltas of centre, size and heading, factors of key points and objectness; rates, decay, epochs, points
PUBLISHED: dict[str, dict[str, Any]] = {
    "sunrgbd": {"deltas": (0.1111, 0.0625, 0.04), "factors": (0.2, 0.4), "lr": 4e-3, "decoder_lr": 2e-4,
                "weight_decay": 1e-8, "epochs": 600, "decays": (420, 480, 540), "points": 20000},
    "scannet": {"deltas": (0.04, 0.1111, 1.0), "factors": (0.8, 0.1), "lr": 6e-3, "decoder_lr": 6e-4,
                "weight_decay": 5e-4, "epochs": 400, "decays": (280, 340), "points": 50000},
}  # fmt: skip


def test_no_detection_recipe_is_forgotten() -> None:
    known = {name for name in shipped() if read_recipe(name).task == "detection3d"}
    assert known == {*DETECTION, "toy-detection3d"}


@pytest.mark.parametrize("name", list(DETECTION))
def test_detection_recipes_have_the_published_numbers(name: str) -> None:
    recipe: Any = read_recipe(name)
    data, known = name.partition("-")[0], PUBLISHED[name.partition("-")[0]]
    loss, train, epoch = recipe.loss.points, recipe.train, SCENES[data] // 32
    assert (loss.center_delta, loss.size_delta, loss.heading_delta) == known["deltas"]
    assert (loss.kps, loss.objectness, loss.box, loss.semantic, loss.topk) == (*known["factors"], 1, 0.1, 4)
    assert (loss.gt_size, recipe.evaluation.gt_size) == ("exact", "exact")
    assert (train.optimizer, train.lr, train.weight_decay, train.clip_norm) == (
        "adamw", known["lr"], known["weight_decay"], 0.1)  # fmt: skip
    assert train.lr * recipe.parameters.decoder_lr == pytest.approx(known["decoder_lr"])
    assert (train.schedule, train.warmup_steps, train.batch_size) == ("step", 0, 32)
    assert train.steps == known["epochs"] * epoch
    assert list(train.milestones) == [(m + 1) * epoch for m in known["decays"]]
    assert recipe.data.points == known["points"]
    motion = (recipe.data.flip_x, recipe.data.flip_y, recipe.data.rotation_deg, recipe.data.scale)
    expected = (0.5, 0.0, 30.0, (0.85, 1.15)) if data == "sunrgbd" else (0.5, 0.5, 5.0, (1.0, 1.0))
    assert motion == expected
    assert recipe.data.aligned_boxes is (data == "scannet")
    protocol = recipe.evaluation
    assert (protocol.nms_iou, protocol.per_class_proposals, protocol.thresholds) == (0.25, True, (0.25, 0.5))


@pytest.mark.parametrize("name", list(DETECTION))
def test_detection_recipes_build_the_published_networks(name: str) -> None:
    recipe: Any = read_recipe(name)
    classes, layers, proposals, width, variant = DETECTION[name]
    with torch.device("meta"):
        model = build_model(recipe, classes)
    points, image = model.points, model.image
    assert (points.layers, points.proposals, len(points.heads)) == (layers, proposals, layers + 1)
    assert points.backbone.levels.points == (2048, 1024, 512, 256)
    assert points.kps is not None
    millions = {(10, 1): 14.363, (18, 1): 14.474, (18, 2): 29.557}[classes, width]
    assert round(sum(p.numel() for p in points.parameters()) / 1e6, 3) == millions
    if variant is None:
        assert image is None
        assert recipe.data.modalities == ("points",)
        assert recipe.fuser == FUSERS["none"]
        return
    assert recipe.data.modalities == ("points", "rgb")
    assert image.detections == 100
    assert (image.dim, image.depth) == ({"ti": 192, "s": 384}[variant], 12)
    assert [len(blocks) for blocks in model.pairs] == [12 // layers] * layers
    assert model.threshold == 0.02
    assert (model.both, model.detach) == (False, True)


@pytest.mark.parametrize("name", [name for name, row in DETECTION.items() if row[-1]])
def test_fused_detection_recipes_follow_the_released_code(name: str) -> None:
    recipe: Any = read_recipe(name)
    loss, parameters, train = recipe.loss, recipe.parameters, recipe.train
    assert (loss.image.classes, loss.image.l1, loss.image.giou, loss.image.no_object) == (1, 5, 2, 0.1)
    assert loss.image_steps == 120 * (SCENES[name.partition("-")[0]] // 32)
    assert loss.sparsity == 1e-3 * 8 * 1024, "for a mean over the tokens of a layer"
    assert train.lr * parameters.image_lr == pytest.approx(5e-5, rel=1e-3)
    assert train.weight_decay * parameters.image_decay == pytest.approx(1e-4)
    assert parameters.fusion_lr == 1, "score networks learn at the rate of what is neither decoder nor image"
    views, size, boxes = (1, (530, 730), "annotated") if name.startswith("sunrgbd") else (10, (484, 648), "projected")
    assert (recipe.data.views, recipe.data.image, recipe.data.boxes2d) == (views, size, boxes)
    assert recipe.model.image["drop_path"] == 0.3
    assert recipe.model.image_weights == ("hustvl/yolos-tiny" if name.endswith("-ti") else "hustvl/yolos-small")


@pytest.mark.parametrize("fuser", list(FUSERS))
def test_an_exchange_is_one_word(fuser: str) -> None:
    recipe = read_recipe("toy-detection3d", [*OVERRIDES, f"fuser={fuser}"])
    assert recipe.fuser == FUSERS[fuser]
    assert type(build_model(recipe, 3).key_exchange[0]).__name__ == FUSERS[fuser]["_target_"].split(".")[-1]


def test_words_of_fusers_belong_to_their_task(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fuser is 'tokenfusion-paper'; did you mean 'tokenfusion'"):
        read_recipe("toy-detection3d", ["fuser=tokenfusion-paper"])
    mine = tmp_path / "mine.yaml"
    mine.write_text("base: toy-detection3d\nfuser: tokenfusion\n")
    recipe = read_recipe(str(mine), ["fuser.threshold=0.1"])
    assert recipe.fuser == {**FUSERS["tokenfusion"], "threshold": 0.1}
    mine.write_text("base: sunrgbd-l6-o256-ti\nfuser: {init_bias: 1.0}\n")
    assert read_recipe(str(mine)).fuser == {**FUSERS["tokenfusion"], "init_bias": 1.0}
