"""What the training loop knows of detection: data, losses, parameter roles, what to watch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenfusion.backbones.detection_keys import load_groupfree
from tokenfusion.backbones.weights import LoadReport, StateDict, fetch
from tokenfusion.backbones.yolos import Yolos
from tokenfusion.backbones.yolos_keys import load_detector
from tokenfusion.components import build, maker
from tokenfusion.data.degrade import PLAIN, Conditions
from tokenfusion.data.folder import Folder
from tokenfusion.data.motion import SceneAugment
from tokenfusion.data.scenes import IMAGE, POINTS, SceneBatch, Scenes
from tokenfusion.errors import UserError
from tokenfusion.fusion.crossing import Exchange
from tokenfusion.fusion.pressure import Pressure
from tokenfusion.tasks.detection3d.groupfree import GroupFree
from tokenfusion.tasks.detection3d.inference import LAST, primary
from tokenfusion.tasks.detection3d.losses import groupfree_losses
from tokenfusion.tasks.detection3d.losses2d import yolos_losses
from tokenfusion.tasks.detection3d.model import DetectionOutput, FusedDetector, Scored
from tokenfusion.tasks.detection3d.settings import DetectionRecipe
from tokenfusion.tasks.fusing import check_threshold
from tokenfusion.train import ParameterGroup, Task

COMPONENTS = {  # keys of a recipe that name parts, and the arguments that the program supplies
    "model.points": ("classes",),
    "model.image": ("classes",),
    "fuser": ("dim", "seed"),
}
EMBEDDINGS = ("_embed", "_token")  # how names of learned tokens end: they do not decay


def build_model(recipe: DetectionRecipe, classes: int, trust: bool = False) -> FusedDetector:
    """The detector of a recipe, freshly initialised from ``recipe.seed``.

    Raises:
        UserError: where a component refuses its arguments; the key is named.
    """
    settings, exchange = recipe.model, maker(recipe.fuser, "fuser", COMPONENTS["fuser"], trust)
    seeds = itertools.count(recipe.seed)  # no two layers draw the same

    def make(dim: int) -> Exchange:
        part = exchange(dim, next(seeds))
        if not isinstance(part, Exchange):
            raise UserError(f"fuser: wanted an Exchange of tokenfusion.fusion.crossing, got {type(part).__name__}")
        return part

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        points = build(settings.points, "model.points", trust, classes=classes)
        if not isinstance(points, GroupFree):
            raise UserError(f"model.points: wanted a GroupFree, got {type(points).__name__}")
        image = None
        if IMAGE in recipe.data.modalities and settings.image is not None:
            image = build(settings.image, "model.image", trust, classes=classes)
            if not isinstance(image, Yolos):
                raise UserError(f"model.image: wanted a Yolos, got {type(image).__name__}")
            if image.detections < 1:
                raise UserError(f"model.image.detections: wanted at least 1, got {image.detections}")
        both, queries = settings.exchange == "both", settings.exchange_queries
        return FusedDetector(points, image, make, both, settings.detach, settings.alignment, queries)


def load_pretrained(model: FusedDetector, recipe: DetectionRecipe) -> list[str]:
    """Fill both networks from the weights that the recipe names; returns the accounts of what was loaded."""
    accounts = []
    points, image = recipe.model.point_weights, recipe.model.image_weights
    if points is not None:
        accounts.append(_started(load_groupfree, model.points, points))
    if image is not None and model.image is not None:
        accounts.append(_started(load_detector, model.image, image))
    return accounts


def _started(load: Callable[[Any, StateDict], LoadReport], network: nn.Module, weights: str) -> str:
    """The account of what was loaded; what does not fit is told with the name of the weights."""
    source = fetch(weights)
    try:
        return load(network, source).summary(weights)
    except UserError as error:
        raise UserError(f"{weights}: {error}") from None


def scenes(
    recipe: DetectionRecipe,
    folder: Folder,
    model: FusedDetector,
    split: str,
    classes: Sequence[str],
    training: bool = False,
    conditions: Conditions | None = None,
) -> Scenes:
    """A split as training or evaluation sees it; labels count the run's ``classes``.

    A folder without images is judged, and predicted on, by its points alone; one without boxes needs no classes.

    Args:
        conditions: under which the split is judged; None: it is not.

    Raises:
        UserError: where it is judged, and no scene has a box of these classes.
    """
    data = recipe.data
    has_images = IMAGE in folder.modalities and folder.scene.camera is not None
    augment = SceneAugment(data.flip_x, data.flip_y, data.rotation_deg, data.scale, data.aligned_boxes)
    found = Scenes(
        folder,
        split,
        data.modalities if training or has_images else (POINTS,),
        data.points,
        augment if training else None,
        recipe.seed,
        data.image,
        data.views,
        model.points.indexer() if data.index_points else None,
        data.boxes2d,
        () if folder.scene.boxes is None else classes,
        data.colour,
        conditions=PLAIN if conditions is None else conditions,
    )
    if conditions is not None and folder.scene.boxes is not None:
        _check_boxes(found, split)
    return found


def _check_boxes(judged: Scenes, split: str) -> None:
    """Figures over no box would all be zero, and say nothing."""
    folder, classes = judged.folder, set(judged.classes)
    if not any(classes & set(folder.read_boxes(id).names) for id in judged.ids):
        path = folder.scene_path(judged.ids[0], "boxes")
        raise UserError(f"{path}: no scene of split {split!r} has a box of the run's classes; nothing can be judged")


class DetectionTask(Task):
    """One phase: both networks together."""

    phases = ("model",)

    def __init__(self, model: FusedDetector, recipe: DetectionRecipe) -> None:
        super().__init__()
        self.model, self.recipe = model, recipe
        self.monitor = f"{LAST}/{primary(recipe.evaluation)}"
        self.judges_images = True
        if recipe.loss.target_rate is not None:
            check_threshold(model.threshold)
        pieces = recipe.train.accumulate
        self.pressure = Pressure(recipe.loss.sparsity, len(model.key_exchange), recipe.loss.target_rate, pieces)

    def begin(self, step: int) -> None:
        end = self.recipe.loss.image_steps
        self.judges_images = end is None or step < end

    def forward(self, batch: SceneBatch) -> DetectionOutput:
        projection = batch.projection
        rate = self.recipe.data.drop_images if self.training else 0.0
        if projection is not None and rate > 0:  # no view shows any point of such a scene
            kept = torch.rand(len(projection), device=projection.device) >= rate
            projection = projection * kept[:, None, None, None]
        return self.model(batch.points, batch.images, projection, batch.index)

    def losses(self, batch: SceneBatch, outputs: DetectionOutput, phase: str) -> dict[str, Tensor]:
        truth, settings = batch.truth, self.recipe.loss
        assert truth is not None, "training needs boxes"
        losses = {f"points/{k}": v for k, v in groupfree_losses(outputs.points, truth, settings.points).items()}
        if outputs.image is not None and self.judges_images:
            losses |= {f"image/{k}": v for k, v in self._image_losses(batch, outputs).items()}
        if outputs.keys and self.pressure.is_on:
            rates = self.model.rates(outputs).values()
            losses["sparsity"] = self.pressure(_layer_norms(outputs), [rate.exchanged.mean() for rate in rates])
        return losses

    def _image_losses(self, batch: SceneBatch, outputs: DetectionOutput) -> dict[str, Tensor]:
        """Every view that is there is judged by the boxes that it shows."""
        truth, projection = batch.truth, batch.projection
        assert truth is not None
        assert projection is not None
        assert outputs.image is not None
        labels = truth.labels.repeat_interleave(projection.shape[1], 0)
        there = projection.flatten(2).any(2).flatten()
        boxes, mask = truth.boxes2d.flatten(0, 1), truth.mask2d.flatten(0, 1)
        return yolos_losses(outputs.image, boxes, labels, mask, self.recipe.loss.image, there)

    def parameter_groups(self, phase: str) -> list[ParameterGroup]:
        model, settings = self.model, self.recipe.parameters
        decoder = model.points.decoder_modules()
        inner = {id(p) for part in decoder for p in part.parameters()}
        groups = [
            ParameterGroup("points", [p for p in model.points.parameters() if id(p) not in inner]),
            ParameterGroup("decoder", [p for part in decoder for p in part.parameters()], settings.decoder_lr),
        ]
        if model.image is not None:
            giving = nn.ModuleList([model.image, model.to_point, model.to_query, model.to_image])
            groups += _image_groups(giving, settings.image_lr, settings.image_decay)
            fusion = nn.ModuleList([model.key_exchange, model.query_exchange, model.patch_exchange])
            groups.append(ParameterGroup("fusion", list(fusion.parameters()), settings.fusion_lr))
        return [group for group in groups if list(group.params)]

    def watch(self, outputs: DetectionOutput) -> dict[str, Tensor]:
        watched = {}
        for block, rate in self.model.rates(outputs).items():
            for name, share in zip(self.model.exchanging, rate.exchanged, strict=True):
                watched[f"exchange/{block}/{name}"] = share
        if outputs.visible is not None:
            watched["visible"] = outputs.visible.double().mean()
        return watched | {f"lambda/layer{i}": value for i, value in enumerate(self.pressure.levels())}


def _image_groups(network: nn.Module, lr: float, decay: float) -> list[ParameterGroup]:
    """Matrices decay; biases, norms and embeddings do not."""
    named = list(network.named_parameters())
    free = {name for name, p in named if p.ndim < 2 or name.endswith(EMBEDDINGS)}
    return [
        ParameterGroup("image", [p for name, p in named if name not in free], lr, decay),
        ParameterGroup("image without decay", [p for name, p in named if name in free], lr, False),
    ]


def _layer_norms(outputs: DetectionOutput) -> list[Tensor]:
    """Of every layer the mean scores of its keys, queries and patches, summed."""
    kinds = (outputs.keys, outputs.queries, outputs.patches)
    layers = ([kind[layer] for kind in kinds if layer < len(kind)] for layer in range(len(outputs.keys)))
    return [torch.stack([_mean_score(scored) for scored in layer]).sum() for layer in layers]


def _mean_score(scored: Scored) -> Tensor:
    """Over the tokens that have a stand-in; zero where none has."""
    return (scored.scores * scored.has).sum() / scored.has.sum().clamp(min=1)
