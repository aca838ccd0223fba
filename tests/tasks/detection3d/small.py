"""A detector of a few tokens, for tests: networks, recipes, batches, and what a run left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tasks.walk import command

from tokenfusion.backbones.vit import ViT
from tokenfusion.backbones.yolos import Yolos
from tokenfusion.data.boxes import contains
from tokenfusion.data.scenes import SceneBatch
from tokenfusion.data.truth import SceneTruth
from tokenfusion.fusion.crossing import Exchange, TokenExchange
from tokenfusion.recipe import read_recipe
from tokenfusion.tasks.detection3d import DetectionTask, build_model
from tokenfusion.tasks.detection3d.groupfree import GroupFree
from tokenfusion.tasks.detection3d.model import FusedDetector

CLASSES, LAYERS = 3, 2
SIZES = {"points": [64, 32, 16, 8], "radii": [0.5, 1.0, 1.5, 2.0], "samples": [8, 8, 8, 8], "width": 0.25}
OVERRIDES = [
    *(f"model.points.{key}={value}" for key, value in {**SIZES, "proposals": 8, "layers": LAYERS}.items()),
    "model.image.detections=8",
    "model.image.init_size=[32, 48]",
    "data.image=[32, 48]",
    "data.points=256",
]
PINNED = [  # what the toy recipe may change, and tests count on
    "model.exchange_queries=false",
    "data.boxes2d=projected",
    "fuser={_target_: tokenfusion.fusion.crossing.TokenExchange, threshold: 0.5, init_bias: null}",
    "parameters={decoder_lr: 0.3, image_lr: 0.3, fusion_lr: 0.3}",
]
STEPS = 4


def words(rooms: Path, *more: str) -> list[str]:
    """The overrides of a run of a second or two, as the command line takes them.

    Sizes start from one near the truth's, and thresholds are low: figures are above 0 from the first step on.
    """
    return [
        f"data.root={rooms}",
        *OVERRIDES,
        *PINNED,
        "model.points.proposals=16",
        f"model.points.mean_sizes={[[0.8] * 3] * 9}",
        "evaluation.thresholds=[0.05, 0.15]",
        "model.image.variant=xs",
        f"train.steps={STEPS}",
        "train.batch_size=2",
        "train.warmup_steps=1",
        "train.log_every=2",
        "train.eval_every=0",
        "train.checkpoint_every=2",
        *more,
    ]


def recipe(rooms: Path, *more: str) -> Any:
    """The tiny recipe, read."""
    return read_recipe("toy-detection3d", words(rooms, *more))


def points_network(**changes: Any) -> GroupFree:
    return GroupFree(CLASSES, layers=LAYERS, proposals=8, dropout=0.0, **{**SIZES, **changes})


def image_network(depth: int = 4) -> Yolos:
    return Yolos(ViT(32, depth, 2, grid=(2, 3)), CLASSES, 8)


def detector(exchange: type[Exchange] = TokenExchange, depth: int = 4, **changes: Any) -> FusedDetector:
    torch.manual_seed(1)
    arguments = {key: changes.pop(key) for key in ("threshold", "rate") if key in changes}
    return FusedDetector(points_network(), image_network(depth), lambda dim: exchange(dim, **arguments), **changes)


def cameras(batch: int, views: int) -> torch.Tensor:
    """Cameras that look ahead from the origin, a little apart from view to view. [B, V, 3, 4]"""
    K = torch.tensor([[40.0, 0, 23.5], [0, 40.0, 15.5], [0, 0, 1]])
    axes = torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])  # right, down, forward of the camera in upright axes
    shift = torch.zeros(views, 3, 1)
    shift[:, 0, 0] = 0.1 * torch.arange(views)
    return (K @ torch.cat([axes.expand(views, 3, 3), -(axes @ shift)], -1)).expand(batch, views, 3, 4).contiguous()


def batch(size: int = 2, views: int = 1, points: int = 256, boxes: int = 3) -> SceneBatch:
    """Scenes two to four metres ahead, most of them in view."""
    generator = torch.Generator().manual_seed(5)
    span = torch.tensor([4.0, 2.0, 1.6])
    cloud = torch.rand(size, points, 3, generator=generator) * span + torch.tensor([-2.0, 2.0, -0.8])
    centre = cloud[:, :boxes]
    sizes = 0.4 + 0.6 * torch.rand(size, boxes, 3, generator=generator)
    found = torch.cat([centre, sizes, torch.rand(size, boxes, 1, generator=generator)], -1)
    owner = torch.full((size, points), -1)
    for row in range(size):
        inside = contains(cloud[row], found[row])
        owner[row] = torch.where(inside.any(1), inside.int().argmax(1), -1) if boxes else owner[row]
    shown = torch.full((size, views, boxes, 4), 0.3)
    truth = SceneTruth(
        found,
        torch.randint(0, CLASSES, (size, boxes), generator=generator),
        torch.ones(size, boxes, dtype=torch.bool),
        owner,
        shown,
        torch.ones(size, views, boxes, dtype=torch.bool),
    )
    images = torch.randn(size, views, 3, 32, 48, generator=generator)
    return SceneBatch([str(i) for i in range(size)], cloud, None, images, cameras(size, views), truth)


def task(*overrides: str) -> DetectionTask:
    recipe = read_recipe("toy-detection3d", [*OVERRIDES, *PINNED, *overrides])
    return DetectionTask(build_model(recipe, CLASSES), recipe).train()


def metrics(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "metrics.json").read_text()))


def files_of(rooms: Path, id: str, *names: str) -> dict[str, Path]:
    """Inputs of one scene: points, rgb, camera."""
    ends = {"points": "npy", "rgb": "png", "camera": "json"}
    return {name: rooms / name / f"{id}.{ends[name]}" for name in names}


def boxes_of(written: list[Path]) -> list[dict[str, Any]]:
    """What one prediction wrote."""
    (path,) = [path for path in written if path.suffix == ".json"]
    return list(json.loads(path.read_text())["boxes"])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The last line of a call that ends with exit code 2; before it there may be the progress of steps."""
    message = command(*arguments, code=2, capsys=capsys)
    *progress, last = message.splitlines()
    assert last.startswith("tokenfusion: "), message
    assert all(line.startswith("step ") for line in progress), message
    return last
