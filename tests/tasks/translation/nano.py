"""The smallest run of translation: every stage, every head, a second or two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenfusion

TASKS = {  # target: inputs
    "normal": ("rgb", "depth"),
    "rgb": ("shade", "edge_texture"),
    "depth": ("rgb", "edge_occlusion"),
    "shade": ("rgb", "normal"),
}
NARROW = "widths: [16, 16, 16, 16, 16], depths: [1, 1, 1, 1, 1]"
STEPS = 4


def words(rooms: Path, target: str = "normal", *more: str) -> list[str]:
    """The overrides that make the toy recipe tiny, as the command line takes them."""
    return [
        f"data.root={rooms}",
        f"data.modalities=[{', '.join(TASKS[target])}]",
        f"data.target={target}",
        "data.resize=null",
        "data.enlarge=null",
        "data.crop=null",
        f"model.generator={{_target_: tokenfusion.backbones.mirror.MirroredMiT, {NARROW}}}",
        "model.placement=every",
        "model.score_nets=stage",
        "fuser={_target_: tokenfusion.fusion.TokenFusion, threshold: 0.5}",
        "loss={sparsity: 1e-3}",
        "evaluation={features: pixels, kid_subsets: 5}",
        f"train.steps={STEPS}",
        "train.batch_size=2",
        "train.lr=2e-3",
        "train.warmup_steps=1",
        "train.log_every=2",
        "train.eval_every=0",
        "train.checkpoint_every=2",
        *more,
    ]


def recipe(rooms: Path, target: str = "normal", *more: str) -> Any:
    """The tiny recipe, read."""
    return tokenfusion.read_recipe("toy-translation", words(rooms, target, *more))
