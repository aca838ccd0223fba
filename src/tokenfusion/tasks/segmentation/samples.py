"""Pictures of a run's decisions, stored for the report: inputs, target, predictions, scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from tokenfusion.backbones.fused import FusedBackbone
from tokenfusion.components import write_text
from tokenfusion.data.augment import Frames
from tokenfusion.tasks.segmentation.inference import Evaluation, infer
from tokenfusion.tasks.segmentation.metrics import IGNORE
from tokenfusion.tasks.segmentation.model import FusedSegmenter


def score_maps(backbone: FusedBackbone, scores: list[Tensor], image: tuple[int, int]) -> dict[str, np.ndarray]:
    """Scores of one image as maps: ``{block name: float32 [M, h, w]}``.

    Args:
        scores: per fused block ``[M, 1, N]``.
        image: (rows, columns) of the network's input.
    """
    maps = {}
    for name, (stage, _), score in zip(backbone.block_names(), backbone.fused_blocks(), scores, strict=True):
        stride = 4 * 2**stage
        grid = (-(-image[0] // stride), -(-image[1] // stride))
        maps[name] = score[:, 0].unflatten(-1, grid).float().cpu().numpy()
    return maps


def write_samples(model: FusedSegmenter, frames: Frames, protocol: Evaluation, out: Path, count: int) -> None:
    """Write ``count`` evenly spaced frames of a split to ``out`` as described by ``index.json``."""
    out.mkdir(parents=True, exist_ok=True)
    folder, device = frames.folder, next(model.parameters()).device
    chosen = np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)
    was_training = model.training
    model.eval()
    for index in chosen:
        frame = frames[int(index)]
        size = frame.target.shape if frame.target is not None else next(iter(frame.inputs.values())).shape[-2:]
        seen = infer(model, {n: x.to(device) for n, x in frame.inputs.items()}, size, protocol)
        arrays = {f"input/{name}": folder.display(frame.id, name) for name in frame.inputs}
        if frame.target is not None:
            arrays["target"] = frame.target.numpy().astype(np.uint8)
        arrays |= {f"prediction/{n}": p.cpu().numpy().astype(np.uint8) for n, p in seen.predictions.items()}
        image = next(iter(frame.inputs.values())).shape[-2:]
        maps = score_maps(model.backbone, seen.scores, (int(image[0]), int(image[1])))
        arrays |= {f"scores/{name}": values for name, values in maps.items()}
        save_npz(out / f"{frame.id.replace('/', '_')}.npz", arrays)
    model.train(was_training)
    classes = [{"name": n, "color": c.tolist()} for n, c in zip(folder.classes, folder.palette, strict=True)]
    index_file = {
        "task": "segmentation",
        "ids": [frames.ids[int(i)].replace("/", "_") for i in chosen],
        "modalities": list(model.modalities),
        "blocks": model.backbone.block_names(),
        "threshold": model.backbone.threshold,
        "classes": classes,
        "ignore": IGNORE,
    }
    write_text(out / "index.json", json.dumps(index_file, indent=1))


def save_npz(path: Path, arrays: Mapping[str, np.ndarray | np.generic]) -> None:
    """Compressed, under exactly this name, whole or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    temporary.replace(path)
