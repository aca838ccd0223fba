"""The one function behind training's figures, ``eval`` and ``predict``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from tokenfusion.backbones.calls import evaluating
from tokenfusion.data.degrade import Conditions
from tokenfusion.data.frames import Frames
from tokenfusion.tasks.fusing import MeanRates, Rates
from tokenfusion.tasks.segmentation.metrics import confusion_matrix
from tokenfusion.tasks.segmentation.model import FusedSegmenter


class Evaluation(Conditions):
    """How a model is judged; the same wherever a figure is made.

    Attributes:
        scales: relative image sizes; several are averaged as probabilities.
        flip: average with the mirrored image too.
        upsample: how logits reach label size; the released code uses bicubic.
        missing, degrade: see :class:`~tokenfusion.data.degrade.Conditions`.
    """

    scales: tuple[Annotated[float, Field(gt=0)], ...] = Field((1.0,), min_length=1)
    flip: bool = False
    upsample: Literal["bilinear", "bicubic"] = "bilinear"

    def __str__(self) -> str:
        scales = "single scale" if self.scales == (1.0,) else f"scales {', '.join(f'{s:g}' for s in self.scales)}"
        return f"{scales}{' + flip' if self.flip else ''}, {self.upsample} to label size, batch 1, fp32{self.told()}"


MULTI_SCALE = {"scales": (0.5, 0.75, 1.0, 1.25, 1.5, 1.75), "flip": True}


class Inference(NamedTuple):
    """One image, seen through the protocol."""

    predictions: dict[str, Tensor]  # stream or "ensemble": int64 [H, W]
    scores: list[Tensor]  # of the plain view: per fused block [M, 1, N]
    present: Tensor | None  # bool [M, 1], None where every modality is there


class Result(NamedTuple):
    """Sums over images, which add up over processes."""

    confusion: dict[str, Tensor]  # stream: int64 [K, K]
    rates: Rates  # block: mean over images, per modality [M]
    images: int


@torch.inference_mode()
def infer(model: FusedSegmenter, inputs: Mapping[str, Tensor], size: Sequence[int], protocol: Evaluation) -> Inference:
    """Segment one image (fp32, eval mode).

    Args:
        inputs: ``{name: [3, H, W]}`` normalised; names may be missing.
        size: (rows, columns) of the prediction.
    """
    batch = {name: x.unsqueeze(0) for name, x in inputs.items()}
    with torch.autocast(next(model.parameters()).device.type, enabled=False):
        plain = model(batch)
        streams = {**plain.logits, "ensemble": plain.ensemble}
        total = {name: _upsample(x, size, protocol) for name, x in streams.items()}
        if protocol.scales != (1.0,) or protocol.flip:
            total = _many_views(model, batch, size, protocol)
    return Inference({name: x[0].argmax(0) for name, x in total.items()}, plain.scores, plain.present)


def _upsample(logits: Tensor, size: Sequence[int], protocol: Evaluation) -> Tensor:
    return F.interpolate(logits, size=tuple(size), mode=protocol.upsample, align_corners=False)


def _many_views(
    model: FusedSegmenter, batch: Mapping[str, Tensor], size: Sequence[int], protocol: Evaluation
) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for scale in protocol.scales:
        for mirrored in (False, True) if protocol.flip else (False,):
            view = {name: _rescale(x, scale, model.backbone.smallest) for name, x in batch.items()}
            if mirrored:
                view = {name: x.flip(-1) for name, x in view.items()}
            output = model(view)
            for name, logits in {**output.logits, "ensemble": output.ensemble}.items():
                full = _upsample(logits.flip(-1) if mirrored else logits, size, protocol).softmax(1)
                total[name] = total[name] + full if name in total else full
    return total


def _rescale(x: Tensor, scale: float, smallest: int) -> Tensor:
    if scale == 1:
        return x
    size = [max(smallest, round(n * scale)) for n in x.shape[-2:]]
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def evaluate(
    model: FusedSegmenter, frames: Frames, classes: int, protocol: Evaluation, rank: int = 0, world: int = 1
) -> Result:
    """Judge a split, image by image; every process takes each ``world``-th image, none twice.

    A modality that the frames leave out has no stream of its own.
    """
    device = next(model.parameters()).device
    streams = [*(n for n in model.modalities if n in frames.specs), "ensemble"]
    confusion = {n: torch.zeros(classes, classes, dtype=torch.int64) for n in streams}
    rates = MeanRates()
    indices = range(rank, len(frames), world)
    with evaluating(model):
        for index in indices:
            frame = frames[index]
            assert frame.target is not None, "evaluation needs labels"
            seen = infer(model, {n: x.to(device) for n, x in frame.inputs.items()}, frame.target.shape, protocol)
            for name, prediction in seen.predictions.items():
                confusion[name] += confusion_matrix(frame.target, prediction.cpu(), classes)
            rates.add(model.backbone.rates(seen.scores, seen.present))
    return Result(confusion, rates.means(), len(indices))
