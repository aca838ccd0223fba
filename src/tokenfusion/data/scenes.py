"""Scenes that training and evaluation draw from a folder, and their batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tokenfusion.data.chance import seeded
from tokenfusion.data.cloud import Cloud, with_channels
from tokenfusion.data.degrade import PLAIN, Conditions, degraded, degraded_cloud
from tokenfusion.data.folder import Folder
from tokenfusion.data.motion import SceneAugment, move_boxes, move_points, move_projection, recolour
from tokenfusion.data.scene_views import Views, load_views
from tokenfusion.data.truth import SceneTruth, annotated_boxes, kept_rows, nearest_box, projected_boxes, stack_truths
from tokenfusion.errors import UserError, nearest

POINTS, IMAGE = "points", "rgb"


class Scene(NamedTuple):
    """One sample; the fields are those of a batch without the first axis."""

    id: str
    points: Tensor
    index: Any
    images: Tensor | None
    projection: Tensor | None
    truth: SceneTruth | None


class SceneBatch(NamedTuple):
    """Scenes stacked: B scenes, N points each, V views."""

    ids: list[str]
    points: Tensor  # float32 [B, N, 3 + C]: upright metres, and colours 0..1 where asked for
    index: Any  # what the index function returned, stacked; or None
    images: Tensor | None  # float32 [B, V, 3, H, W], normalised; zeros where a scene has fewer views
    projection: Tensor | None  # float32 [B, V, 3, 4], (u z, v z, z) = P (x, y, z, 1); zeros where there is no view
    truth: SceneTruth | None


class Scenes(Dataset[Scene]):
    """A split of a folder as scenes; item = pure function of (seed, epoch, index).

    ``set_epoch`` reaches running DataLoader workers; evaluation, without ``augment``, takes the epoch as the number of its
    repetition: each draws other points. The cloud moves with its boxes and projections; images stay as they are. A point
    belongs to the box that the folder's instance file names, else to the one of those around it whose centre is nearest.

    Args:
        folder: its dataset.yaml has a section ``scene``.
        split: name of the split.
        modalities: ``("points",)`` or ``("points", "rgb")``.
        points: how many of a cloud are drawn; a smaller one is filled up with points that stand there twice.
        augment: None for evaluation.
        seed: of all draws.
        image_size: (rows, columns) that every image is resized to; its camera and 2D boxes go along.
        views: images of a scene; of more, evenly spread ones are taken.
        index: called with x y z [N, 3]; its tensors come with the scene, so that workers compute them.
        boxes2d: "annotated" (box2d of the files) or "projected" (around the 3D boxes, hidden parts included).
        classes: the names that labels stand for, by default all of the folder; boxes of other classes are left out.
        colour: points come with their colours, [N, 6].
        conditions: which inputs evaluation leaves out, and what befalls the others.

    Errors: UserError for an unknown split, modality or class, for annotated boxes to train on that no scene has, and at
    once where files of the split are missing.
    """

    def __init__(
        self,
        folder: Folder,
        split: str,
        modalities: Sequence[str] = (POINTS,),
        points: int = 20000,
        augment: SceneAugment | None = None,
        seed: int = 0,
        image_size: tuple[int, int] | None = None,
        views: int = 1,
        index: Callable[[Tensor], Any] | None = None,
        boxes2d: Literal["annotated", "projected"] = "annotated",
        classes: Sequence[str] | None = None,
        colour: bool = False,
        conditions: Conditions = PLAIN,
    ) -> None:
        self.folder, self.points, self.augment, self.seed = folder, points, augment, seed
        self.image_size, self.views, self.index, self.boxes2d, self.colour = image_size, views, index, boxes2d, colour
        self.ids = folder.ids(split)
        self.classes = list(folder.scene.classes if classes is None else classes)
        self.conditions = conditions
        self.has_images = IMAGE in conditions.given({name: name for name in modalities})
        if augment is not None:
            folder.scene_path(self.ids[0], "boxes")  # who trains needs them
        self._check_arguments(list(modalities))
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change
        self._check_files(split)
        self._check_boxes2d(split)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Scene:
        id, generator = self.ids[index], seeded(self.seed, int(self._epoch), index % len(self.ids))
        motion = None if self.augment is None else self.augment.draw(generator)
        cloud = self._cloud(id)
        rows = draw_rows(len(cloud.points), self.points, generator)
        points = with_channels(cloud.points, self.colour, self.folder.scene_path(id, POINTS))[rows]
        views = self._views(id) if self.has_images else None
        truth = self._truth(id, points[:, :3], None if cloud.box is None else cloud.box[rows], views)
        projection = None if views is None else views.projection
        if motion is not None and self.augment is not None:
            points = move_points(points, motion)
            if self.colour:
                points = torch.cat([points[:, :3], recolour(points[:, 3:], generator)], 1)
            projection = None if projection is None else move_projection(projection, motion)
            if truth is not None:
                truth = truth._replace(boxes=move_boxes(truth.boxes, motion, self.augment.aligned_boxes))
        found = None if self.index is None else self.index(points[:, :3])
        images = None if views is None else views.images
        return Scene(id, points, found, images, None if projection is None else projection.float(), truth)

    def _cloud(self, id: str) -> Cloud:
        cloud, how = self.folder.read_cloud(id), self.conditions.degrade.get(POINTS)
        return cloud if how is None else degraded_cloud(cloud, how, id)

    def _views(self, id: str) -> Views:
        assert self.image_size is not None  # checked when the scenes were made
        spec, how = self.folder.modalities[IMAGE], self.conditions.degrade.get(IMAGE)
        worse = None if how is None else lambda image, file: degraded(image, spec, how, f"{id}/{file}", IMAGE)
        return load_views(self.folder.read_views(id), spec, self.image_size, self.views, worse)

    def _truth(self, id: str, xyz: Tensor, owner: Tensor | None, views: Views | None) -> SceneTruth | None:
        """Before any motion: which point lies in which box does not change with it."""
        if self.folder.scene.boxes is None:
            return None
        found = self.folder.read_boxes(id)
        kept = [row for row, name in enumerate(found.names) if name in self.classes]
        boxes, labels = found.boxes[kept], [self.classes.index(found.names[row]) for row in kept]
        if owner is not None:
            self._check_owner(id, owner, len(found.names))
        return SceneTruth(
            boxes=boxes,
            labels=torch.tensor(labels, dtype=torch.int64),
            mask=torch.ones(len(kept), dtype=torch.bool),
            point_box=nearest_box(xyz, boxes) if owner is None else kept_rows(owner, kept, len(found.names)),
            **self._shown(boxes, found.boxes2d[kept], views),
        )

    def _shown(self, boxes: Tensor, boxes2d: Tensor, views: Views | None) -> dict[str, Tensor]:
        if views is None:
            return {"boxes2d": torch.zeros(0, len(boxes), 4), "mask2d": torch.zeros(0, len(boxes), dtype=torch.bool)}
        annotated = self.boxes2d == "annotated"
        shown, mask = annotated_boxes(boxes2d, views) if annotated else projected_boxes(boxes, views)
        return {"boxes2d": shown, "mask2d": mask}

    def _check_owner(self, id: str, owner: Tensor, count: int) -> None:
        if owner.numel() and not (owner.min() >= -1 and owner.max() < count):
            path = self.folder.scene_path(id, "instance")
            raise UserError(f"{path}: names rows {int(owner.min())}..{int(owner.max())}, wanted -1..{count - 1}")

    def _check_arguments(self, modalities: list[str]) -> None:
        if POINTS not in modalities or not {*modalities} <= {POINTS, IMAGE}:
            raise UserError(f"data.modalities is {modalities}; wanted [points] or [points, rgb]")
        if self.points < 1 or self.views < 1:
            raise UserError(f"data.points {self.points} and data.views {self.views} must be above 0")
        for name in self.classes:
            if name not in self.folder.scene.classes:
                known = nearest(name, self.folder.scene.classes)
                raise UserError(f"{self.folder.file}: scene.classes has no {name!r}; {known}")
        if not self.has_images:
            return
        if self.image_size is None or len(self.image_size) != 2 or min(self.image_size) < 1:
            raise UserError(f"data.image is {self.image_size}; wanted [rows, columns] that images are resized to")
        if self.folder.select([IMAGE])[IMAGE].kind != "rgb":
            raise UserError(f"{self.folder.file}: modalities.rgb must be of kind rgb where points are fused with it")
        if self.boxes2d not in ("annotated", "projected"):
            raise UserError(f"data.boxes2d is {self.boxes2d!r}; choose annotated or projected")

    def _check_files(self, split: str) -> None:
        """A missing file should stop a run before its first step, not in its last hour."""
        keys = [key for key in self.folder.scene.files if key != "camera" or self.has_images]
        paths = [self.folder.scene_path(id, key) for id in self.ids for key in keys]
        missing = [path for path in paths if not path.is_file()]
        if not missing and self.has_images:
            paths = [view.image for id in self.ids for view in self.folder.read_views(id)]
            missing = [path for path in paths if not path.is_file()]
        if missing:
            raise UserError(f"{missing[0]}: no such file; split {split!r} lacks {len(missing)} of {len(paths)} files")

    def _check_boxes2d(self, split: str) -> None:
        """Training would learn nothing from the images; evaluation and prediction need no rectangles."""
        is_asked = self.augment is not None and self.has_images and self.boxes2d == "annotated"
        if not is_asked or self.folder.scene.boxes is None:
            return
        if not any(self.folder.read_boxes(id).boxes2d.isfinite().any() for id in self.ids):
            path = self.folder.scene_path(self.ids[0], "boxes")
            raise UserError(f"{path}: no box of split {split!r} has a box2d; set data.boxes2d to projected")


def draw_rows(count: int, wanted: int, generator: torch.Generator) -> Tensor:
    """int64 [wanted]: rows of a cloud of ``count`` points, none twice; where they are too few, all and some again."""
    rows = torch.randperm(count, generator=generator)[:wanted]
    more = torch.randint(count, (max(wanted - count, 0),), generator=generator)
    return torch.cat([rows, more])


def collate_scenes(scenes: Sequence[Scene]) -> SceneBatch:
    """Stack scenes of one data set; boxes are padded to the most that one of them has."""
    first, truths = scenes[0], [scene.truth for scene in scenes if scene.truth is not None]
    return SceneBatch(
        [scene.id for scene in scenes],
        torch.stack([scene.points for scene in scenes]),
        None if first.index is None else _stack([scene.index for scene in scenes]),
        None if first.images is None else torch.stack([s.images for s in scenes if s.images is not None]),
        None if first.projection is None else torch.stack([s.projection for s in scenes if s.projection is not None]),
        stack_truths(truths) if truths else None,
    )


def _stack(values: Sequence[Any]) -> Any:
    """Tensors, or tuples of them (named ones keep their names), get a first axis."""
    first = values[0]
    if isinstance(first, Tensor):
        return torch.stack(list(values))
    parts = [_stack(column) for column in zip(*values, strict=True)]
    return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
