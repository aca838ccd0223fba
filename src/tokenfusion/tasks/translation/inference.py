"""The one function behind training's figures, ``eval`` and ``predict``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from tokenfusion.backbones.calls import evaluating
from tokenfusion.components import TARGET, Component, build
from tokenfusion.data.degrade import Conditions
from tokenfusion.data.frames import Frame, Frames
from tokenfusion.data.inputs import from_tanh
from tokenfusion.data.modality import ModalitySpec
from tokenfusion.errors import UserError
from tokenfusion.tasks.fusing import MeanRates, Rates
from tokenfusion.tasks.translation import metrics
from tokenfusion.tasks.translation.features import Features, as_features, to_uint8
from tokenfusion.tasks.translation.model import FusedTranslator
from tokenfusion.tasks.translation.released import drawn, released_distances

TRUTH = "truth"


class Evaluation(Conditions):
    """How a model is judged; the same wherever a figure is made.

    Attributes:
        protocol: ``standard``: the images as they are. ``released``: the released code's habits, for its published
            figures only: every image stretched to its own range and drawn at 500 x 500, KID of the whole set.
        features: what FID and KID compare: ``inception``, ``dinov2``, ``pixels``, or a component that maps uint8
            ``[B, 3, H, W]`` to ``[B, D]``; ``none``: neither is computed.
        feature_weights: file, folder or hub id for ``inception`` and ``dinov2``.
        kid_subsets, kid_subset_size: of the standard protocol.
        missing, degrade: see :class:`~tokenfusion.data.degrade.Conditions`.
    """

    protocol: Literal["standard", "released"] = "standard"
    features: Literal["none", "inception", "dinov2", "pixels"] | Component = "none"
    feature_weights: str | None = None
    kid_subsets: int = Field(100, ge=1)
    kid_subset_size: int = Field(100, ge=2)

    @property
    def primary(self) -> str:
        """The figure that ranks."""
        return "mae" if self.features == "none" else "fid"

    def describe(self, features: str | None) -> str:
        """The protocol in one line; ``features`` is the extractor's name."""
        line = f"{self.protocol}: batch 1, fp32, MAE and MSE in -1..1 over measured pixels{self.told()}"
        if features is None:
            return line
        if self.protocol == "released":
            return f"{line}; FID and KID (whole set, x 100) on {features} of images stretched to 500x500"
        return f"{line}; FID and KID ({self.kid_subsets} subsets of {self.kid_subset_size}, x 100) on {features}"


def extractor_of(protocol: Evaluation, trust: bool = False) -> Features | None:
    """The feature extractor that a protocol names, if it names one.

    Raises:
        UserError: where its weights are not named or not to be had, or it is not trusted.
    """
    named, weights = protocol.features, protocol.feature_weights
    if named == "none":
        return None
    if isinstance(named, str):
        if named != "pixels" and weights is None:
            raise UserError(f"evaluation.features is {named}, which needs its weights: evaluation.feature_weights=FILE")
        arguments = {} if named == "pixels" else {"weights": weights}
        named = {TARGET: f"tokenfusion.tasks.translation.features.{named}", **arguments}
    return as_features(build(named, "evaluation.features", trust))


class Inference(NamedTuple):
    """One image, seen by the model."""

    images: dict[str, Tensor]  # branch or "ensemble": float32 [3, H, W] in -1..1
    scores: list[Tensor]  # per fused block [M, 1, N]
    present: Tensor | None  # bool [M, 1], None where every modality is there


class Result(NamedTuple):
    """One row per image of the whole split, zero where another process has the image: rows add up over processes."""

    pixels: dict[str, Tensor]  # stream: float64 [n, 3], see metrics.image_errors
    physical: dict[str, Tensor]  # stream: float64 [n, 2], degrees or metres; empty where the target has neither
    spread: dict[str, Tensor]  # stream or "truth": float64 [n, 193]
    features: dict[str, Tensor]  # stream or "truth": float32 [n, D]; empty without an extractor
    rates: Rates

    def added(self, add: Callable[[Tensor], Tensor]) -> Result:
        """The same with every process's rows; the rates stay this process's."""

        def over(table: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: add(rows) for name, rows in table.items()}

        return Result(over(self.pixels), over(self.physical), over(self.spread), over(self.features), self.rates)


@torch.inference_mode()
def infer(model: FusedTranslator, inputs: Mapping[str, Tensor]) -> Inference:
    """Translate one image (fp32, eval mode): ``{name: [3, H, W]}`` in -1..1; names may be missing."""
    batch = {name: x.unsqueeze(0) for name, x in inputs.items()}
    with torch.autocast(next(model.parameters()).device.type, enabled=False):
        seen = model(batch)
    images = {**seen.images, "ensemble": seen.ensemble}
    return Inference({name: x[0] for name, x in images.items()}, seen.scores, seen.present)


def evaluate(
    model: FusedTranslator,
    frames: Frames,
    protocol: Evaluation,
    extractor: Features | None,
    rank: int = 0,
    world: int = 1,
) -> Result:
    """Judge a split, image by image; every process takes each ``world``-th image, none twice."""
    device = next(model.parameters()).device
    if extractor is not None:
        extractor.to(device)
    target = frames.specs[frames.target or ""]
    tables: tuple[dict[str, Tensor], ...] = ({}, {}, {}, {})
    rates = MeanRates()
    own = range(rank, len(frames), world)
    with evaluating(model):
        for index in own or [0]:  # a process without images looks at one, for the shapes of its empty rows
            frame = frames[index]
            seen = infer(model, {n: x.to(device) for n, x in frame.inputs.items()})
            for table, rows in zip(tables, _rows(frame, seen.images, target, protocol, extractor), strict=True):
                for name, row in rows.items():
                    table.setdefault(name, torch.zeros(len(frames), len(row), dtype=row.dtype))
                    table[name][index] = row if own else 0
            rates.add(model.backbone.rates(seen.scores, seen.present))
    pixels, physical, spread, features = tables
    return Result(pixels, physical, spread, features, rates.means())


def _rows(
    frame: Frame, images: Mapping[str, Tensor], target: ModalitySpec, protocol: Evaluation, extractor: Features | None
) -> tuple[dict[str, Tensor], ...]:
    """What one image adds to the tables of a result."""
    truth, valid = frame.target, frame.valid
    assert truth is not None, "evaluation needs a target"
    assert valid is not None
    images = {name: x.cpu() for name, x in images.items()}
    pixels = {name: metrics.image_errors(x, truth, valid) for name, x in images.items()}
    physical: dict[str, Tensor] = {}
    if target.modality.is_vector:
        physical = {name: metrics.angle_deg(x, truth, valid) for name, x in images.items()}
    elif target.kind == "depth":
        metres = from_tanh(truth, target)
        physical = {name: metrics.depth_error_m(from_tanh(x, target), metres, valid) for name, x in images.items()}
    shown = {TRUTH: truth, **{name: torch.where(valid, x, truth) for name, x in images.items()}}
    spread = {name: metrics.spread(x, valid) for name, x in shown.items()}
    if extractor is None:
        return pixels, physical, spread, {}
    draw = drawn if protocol.protocol == "released" else to_uint8
    some = next(iter((*extractor.parameters(), *extractor.buffers())), truth)
    found = extractor(torch.stack([draw(x) for x in shown.values()]).to(some.device)).cpu()
    return pixels, physical, spread, dict(zip(shown, found, strict=True))


def figures(result: Result, target: ModalitySpec, protocol: Evaluation, seed: int) -> dict[str, dict[str, float]]:
    """Stream -> metric -> value; FID and KID where there are features, KID times 100 as published."""
    table: dict[str, dict[str, float]] = {}
    unit = "angle_deg" if target.modality.is_vector else "mae_m"
    for name, rows in result.pixels.items():
        row = {}
        if result.features:
            made, true = result.features[name], result.features[TRUTH]
            if protocol.protocol == "released":
                row["fid"], row["kid"] = released_distances(made, true)
            else:
                kid = metrics.kernel_distance(made, true, protocol.kid_subsets, protocol.kid_subset_size, seed)
                row |= {"fid": metrics.frechet_distance(made, true), "kid": 100 * kid.mean, "kid_std": 100 * kid.std}
        row["mae"], row["mse"] = metrics.mean_over_pixels(rows)
        if name in result.physical:
            row[unit] = metrics.mean_over_pixels(result.physical[name])[0]
        row["contrast"], row["diversity"] = metrics.spread_ratios(result.spread[name], result.spread[TRUTH])
        table[name] = row
    return table


def collapsed(streams: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The streams whose images are constant, or all alike whatever comes in."""
    return [name for name, row in streams.items() if metrics.collapsed(row["contrast"], row["diversity"])]
