"""Pictures of a run's decisions, stored for the report: inputs, target, predictions, scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokenfusion.backbones.calls import evaluating
from tokenfusion.backbones.dense import FusedPyramid
from tokenfusion.components import write_text
from tokenfusion.data.frames import Frame, Frames
from tokenfusion.tasks.predictions import save_npz, score_arrays

COUNT = 6

Seen = tuple[dict[str, np.ndarray], list[Tensor]]  # "target" and "prediction/..." as uint8; scores per fused block


def write_samples(
    model: nn.Module,
    backbone: FusedPyramid,
    frames: Frames,
    see: Callable[[Frame, dict[str, Tensor]], Seen],
    out: Path,
    index: Mapping[str, Any],
) -> None:
    """Write some evenly spaced frames of a split to ``out`` as described by ``index.json``.

    Args:
        model: put into eval mode meanwhile.
        backbone: the fused network in it.
        see: what to show of a frame, from it and its inputs on the model's device.
        index: what the task adds to ``index.json``.
    """
    out.mkdir(parents=True, exist_ok=True)
    device = next(model.parameters()).device
    chosen = np.linspace(0, len(frames) - 1, min(COUNT, len(frames))).round().astype(int)
    with evaluating(model):
        for number in chosen:
            frame = frames[int(number)]
            arrays = {f"input/{name}": frames.folder.display(frame.id, name) for name in frame.inputs}
            with torch.inference_mode():
                shown, scores = see(frame, {name: x.to(device) for name, x in frame.inputs.items()})
            maps = score_arrays(backbone, scores, next(iter(frame.inputs.values())).shape[-2:])
            maps = {f"scores/{name}": values for name, values in maps.items()}
            save_npz(out / f"{frame.id.replace('/', '_')}.npz", {**arrays, **shown, **maps})
    common = {
        "ids": [frames.ids[int(i)].replace("/", "_") for i in chosen],
        "modalities": list(backbone.modalities),
        "blocks": backbone.block_names(),
        "threshold": backbone.threshold,
    }
    write_text(out / "index.json", json.dumps({**index, **common}, indent=1))
