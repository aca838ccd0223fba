"""What the report shows of a segmented frame: label images, and their classes and colours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from tokenfusion.data.frames import Frame, Frames
from tokenfusion.tasks.samples import Seen
from tokenfusion.tasks.samples import write_samples as write
from tokenfusion.tasks.segmentation.inference import Evaluation, infer
from tokenfusion.tasks.segmentation.metrics import IGNORE
from tokenfusion.tasks.segmentation.model import FusedSegmenter


def write_samples(model: FusedSegmenter, frames: Frames, protocol: Evaluation, out: Path) -> None:
    """Write some frames of a split to ``out``."""
    folder = frames.folder

    def see(frame: Frame, inputs: dict[str, Tensor]) -> Seen:
        size = frame.target.shape if frame.target is not None else next(iter(inputs.values())).shape[-2:]
        seen = infer(model, inputs, size, protocol)
        shown = {} if frame.target is None else {"target": frame.target.numpy().astype(np.uint8)}
        shown |= {f"prediction/{n}": p.cpu().numpy().astype(np.uint8) for n, p in seen.predictions.items()}
        return shown, seen.scores

    classes = [{"name": n, "color": c.tolist()} for n, c in zip(folder.classes, folder.palette, strict=True)]
    write(model, model.backbone, frames, see, out, {"task": "segmentation", "classes": classes, "ignore": IGNORE})
