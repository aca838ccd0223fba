"""What a run's model looks like in one file: its network between named tensors, and the facts for those who feed it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenfusion import api
from tokenfusion.data.folder import DatasetSpec
from tokenfusion.data.modality import ModalitySpec

FACTS = "tokenfusion"  # the key of ONNX's metadata; in pt2 an extra file of this name and .json
Tensors = dict[str, Tensor]


class Graph(NamedTuple):
    """What goes into a file."""

    network: nn.Module  # {name: tensor} -> {name: tensor}
    draw: Callable[[int], Tensors]  # batch -> random inputs
    holds: dict[str, str]  # what each output is, in order
    facts: dict[str, Any]
    batch: int | None  # None: any


class Segments(nn.Module):
    """``{modality: [B, 3, H, W]} -> {"ensemble", "logits/<modality>": [B, K, H, W], "scores/<block>": [M, B, N]}``.

    Logits are enlarged to the images' size as in evaluation.
    """

    def __init__(self, model: Any, upsample: str) -> None:
        super().__init__()
        self.model, self.upsample = model, upsample

    def forward(self, inputs: Tensors) -> Tensors:
        found, size = self.model(inputs), next(iter(inputs.values())).shape[-2:]
        maps = {"ensemble": found.ensemble, **_named("logits", found.logits)}
        maps = {n: F.interpolate(x, size=size, mode=self.upsample, align_corners=False) for n, x in maps.items()}
        return {**maps, **_scores(self.model, found.scores)}


class Translates(nn.Module):
    """``{modality: [B, 3, H, W]} -> {"ensemble", "images/<modality>": [B, 3, H, W], "scores/<block>": [M, B, N]}``."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensors) -> Tensors:
        found = self.model(inputs)
        return {"ensemble": found.ensemble, **_named("images", found.images), **_scores(self.model, found.scores)}


def _named(what: str, entries: Mapping[str, Tensor]) -> Tensors:
    return {f"{what}/{name}": x for name, x in entries.items()}


def _scores(model: Any, scores: Sequence[Tensor]) -> Tensors:
    return _named("scores", dict(zip(model.backbone.block_names(), scores, strict=True)))


class Detects(nn.Module):
    """``{"points", "rgb", "projection"} -> {"boxes", "objectness", "probabilities"}`` of the last head, before suppression."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensors) -> Tensors:
        found = self.model(inputs["points"], inputs.get("rgb"), inputs.get("projection")).points.heads[-1]
        boxes, probabilities = self.model.points.boxes(found), found.class_scores.softmax(-1)
        return {"boxes": boxes, "objectness": found.objectness.sigmoid(), "probabilities": probabilities}


def of_images(model: Any, dataset: DatasetSpec, recipe: api.Recipe, size: tuple[int, int], batch: int | None) -> Graph:
    """Segmentation and translation: aligned images come in, maps of their size go out."""
    names, specs = model.modalities, dataset.modalities
    if recipe.task == "segmentation":
        network: nn.Module = Segments(model, recipe.evaluation.upsample)
        what, value, describe = "logits", "logits of the classes", _normalised
        more: dict[str, Any] = {"classes": [entry.name for entry in dataset.classes]}
    else:
        network, what, value, describe = Translates(model), "images", "an image in -1..1", _coded
        more = {"target": {"name": recipe.data.target, **_coded(specs[recipe.data.target])}}
    holds = dict.fromkeys(["ensemble", *(f"{what}/{name}" for name in names)], value)
    holds |= dict.fromkeys((f"scores/{name}" for name in model.backbone.block_names()), "scores of the tokens")
    facts = {
        **_head(recipe, model.backbone.threshold, size, batch),
        "modalities": list(names),
        "inputs": {name: {"shape": [batch or "batch", 3, *size], **describe(specs[name])} for name in names},
        **more,
    }

    def draw(count: int) -> Tensors:
        generator = torch.Generator().manual_seed(0)
        return {name: torch.rand(count, 3, *size, generator=generator) * 2 - 1 for name in names}

    return Graph(network, draw, holds, facts, batch)


def of_detection(
    model: Any, dataset: DatasetSpec, recipe: api.Recipe, size: tuple[int, int], batch: int | None
) -> Graph:
    """3D detection: a cloud comes in, with the images of its scene where the run has them."""
    data, has_images, batch = recipe.data, model.image is not None, batch or 1
    assert dataset.scene is not None, "a detection run has scenes"
    cloud = {"shape": [batch, data.points, 3], "unit": "metres", "axes": "upright, z is up"}
    inputs: dict[str, Any] = {"points": cloud}
    if has_images:
        inputs["rgb"] = {"shape": [batch, data.views, 3, *size], **_normalised(dataset.modalities["rgb"])}
        inputs["projection"] = {
            "shape": [batch, data.views, 3, 4],
            "holds": "K [R|t] from metres to pixels of the resized image; zeros = this view is missing",
        }
    holds = {
        "boxes": "centre, full sizes in metres, yaw in radians, counter-clockwise",
        "objectness": "a probability",
        "probabilities": "of the classes",
    }
    facts = {
        **_head(recipe, model.threshold, size, batch),
        "modalities": list(data.modalities),
        "inputs": inputs,
        "classes": list(dataset.scene.classes),
    }

    def draw(count: int) -> Tensors:
        generator = torch.Generator().manual_seed(0)
        cloud = torch.rand(count, data.points, 3, generator=generator) * 4 - torch.tensor([2.0, -1.0, 2.0])
        if not has_images:
            return {"points": cloud}
        images = torch.randn(count, data.views, 3, *size, generator=generator)
        return {"points": cloud, "rgb": images, "projection": _camera(size).expand(count, data.views, 3, 4)}

    return Graph(Detects(model), draw, holds, facts, batch)


def _camera(size: tuple[int, int]) -> Tensor:
    """The projection [3, 4] of a camera at the origin that looks along y and sees a right angle."""
    rows, columns = size
    focal, u, v = columns / 2, (columns - 1) / 2, (rows - 1) / 2
    return torch.tensor([[focal, u, 0, 0], [0, v, -focal, 0], [0, 1.0, 0, 0]])


def _head(recipe: api.Recipe, threshold: float | None, size: tuple[int, int], batch: int | None) -> dict[str, Any]:
    facts = {FACTS: version("tokenfusion"), "task": recipe.task, "height": size[0], "width": size[1]}
    return {**facts, "batch": batch or "any", "threshold": threshold}


def _normalised(spec: ModalitySpec) -> dict[str, Any]:
    """How an image becomes an input of segmentation or detection: ``data.inputs.normalise`` in words."""
    kind = spec.modality
    facts: dict[str, Any] = {"kind": spec.kind, "unit": kind.unit, "formula": "(value - mean) / std"}
    facts |= {"mean": list(spec.mean or kind.mean), "std": list(spec.std or kind.std)}
    return facts if kind.missing is None else {**facts, "missing": {"value": 0.0, "input": 0.0}}


def _coded(spec: ModalitySpec) -> dict[str, Any]:
    """How an image becomes an input of translation, and its output an image: ``data.inputs.to_tanh`` in words."""
    low, high = spec.limits
    formula = f"2 * (value - {low:g}) / {high - low:g} - 1, clipped to -1..1"
    if spec.kind == "depth":
        formula = f"2 * ln(1 + value / {low:g}) / ln(1 + {high:g} / {low:g}) - 1, clipped to -1..1"
    facts: dict[str, Any] = {"kind": spec.kind, "unit": spec.modality.unit, "formula": formula, "range": [low, high]}
    return facts if spec.modality.missing is None else {**facts, "missing": {"value": 0.0, "input": -1.0}}
