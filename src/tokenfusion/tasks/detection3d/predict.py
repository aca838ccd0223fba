"""Boxes for one's own clouds and images, and the pictures of them; the report shows the same."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokenfusion.backbones.calls import evaluating
from tokenfusion.components import write_text
from tokenfusion.data.boxes import corners
from tokenfusion.data.cloud import read_cloud, with_channels
from tokenfusion.data.description import default_palette
from tokenfusion.data.folder import DatasetSpec, Folder
from tokenfusion.data.image import read_image
from tokenfusion.data.modality import ModalitySpec
from tokenfusion.data.picture import picture
from tokenfusion.data.scene import View, projection_of, read_camera
from tokenfusion.data.scene_views import load_views, spread
from tokenfusion.data.scenes import IMAGE, POINTS, SceneBatch, Scenes, collate_scenes, draw_rows
from tokenfusion.errors import UserError, nearest
from tokenfusion.fusion.exchange import below
from tokenfusion.fusion.projection import patch_index, project
from tokenfusion.report.boxes import Boxes, draw_above, draw_boxes
from tokenfusion.tasks.detection3d.inference import LAST, Seen, infer
from tokenfusion.tasks.detection3d.metrics import Detections, Protocol, suppress
from tokenfusion.tasks.detection3d.model import FusedDetector
from tokenfusion.tasks.detection3d.nms import nms3d
from tokenfusion.tasks.detection3d.settings import DetectionRecipe
from tokenfusion.tasks.detection3d.task import scenes
from tokenfusion.tasks.predictions import Predicts, new_files, save_npz, staged
from tokenfusion.train import warn

CAMERA = "camera"
EXAMPLE = "points=a.npy rgb=a.jpg camera=a.json"
SHOWN = 0.3  # the least objectness of a box in a picture
ONE_PLACE = 0.25  # IoU of boxes that a picture takes for one thing
SAMPLES = 6


class DetectionPredictor(Predicts):
    """Writes, of each scene, ``ID.json`` (its boxes), ``ID_above.png``, ``ID_boxes.png`` (one per view) and ``ID_scores.npz``.

    A cloud's points are drawn as in evaluation, so that a folder gives the boxes that were judged. How many of them the
    images show is printed, and a scene whose images show none is warned of: its camera can hardly be right.

    Args:
        model: in eval mode.
        spec: the data set description that the run was trained with: classes, how images are read.
        recipe: of the run.
    """

    example = EXAMPLE

    def __init__(self, model: FusedDetector, spec: DatasetSpec, recipe: DetectionRecipe) -> None:
        assert spec.scene is not None, "a detection run has scenes"
        self.model, self.spec, self.recipe, self.classes = model, spec, recipe, list(spec.scene.classes)

    def files(self, files: Mapping[str, Path], out: Path) -> list[Path]:
        """One scene: a cloud, and where the run takes images an image and its camera, or a camera file that names views."""
        known = (POINTS,) if self.model.image is None else (POINTS, IMAGE, CAMERA)
        for name in files:
            if name not in known:
                raise UserError(f"{name}=...: this run takes no such input; {nearest(name, known)}")
        if POINTS not in files:
            raise UserError("points=FILE is missing: detection wants a point cloud (.npy, .ply, .bin or .pcd)")
        if IMAGE in files and CAMERA not in files:
            raise UserError(f"{files[IMAGE]}: without camera=FILE nobody knows where the image shows a point; add it")
        views = self._views(files)
        batch = self._batch(files[POINTS], views)
        with staged(out, {*files.values(), *(view.image for view in views)}) as (stage, written):
            self._one(files[POINTS].stem, batch, views, stage)
        _tell({files[POINTS].stem: shown_points(batch)}, self.recipe.data.points)
        return written

    def _views(self, files: Mapping[str, Path]) -> list[View]:
        if CAMERA not in files:
            return []
        views = read_camera(files[CAMERA], files.get(IMAGE))
        if IMAGE in files and [view.image for view in views] != [files[IMAGE]]:
            raise UserError(f"{files[CAMERA]}: lists views, which name their images; leave rgb={files[IMAGE]} out")
        return views

    def _batch(self, path: Path, views: Sequence[View]) -> SceneBatch:
        data = self.recipe.data
        cloud = with_channels(read_cloud(path).points, data.colour, path)
        points = cloud[draw_rows(len(cloud), data.points, torch.Generator().manual_seed(self.recipe.seed))]
        index = self.model.points.indexer()(points[:, :3])
        batched = type(index)(*(x[None] for x in index))
        if self.model.image is None or not views:
            return SceneBatch([path.stem], points[None], batched, None, None, None)
        found = load_views(views, self.spec.modalities[IMAGE], data.image, data.views)
        return SceneBatch([path.stem], points[None], batched, found.images[None], found.projection[None].float(), None)

    def folder(self, folder: Folder, split: str | None, out: Path) -> list[Path]:
        """A split of a data set folder, or all of its ids."""
        places: dict[str, tuple[Scenes, int]] = {}  # of each id the first
        for name in [split] if split else list(folder.spec.splits):
            judged = scenes(self.recipe, folder, self.model, name, self.classes)
            for index, id in enumerate(judged.ids):
                places.setdefault(id, (judged, index))
        views = {id: folder.read_views(id) if judged.has_images else [] for id, (judged, _) in places.items()}
        sources = {view.image for shown in views.values() for view in shown}  # the truth, too, is not written over
        sources |= {folder.scene_path(id, key) for id in places for key in folder.scene.files}
        sources |= {folder.image_path(id, name) for id in places for name in folder.modalities}
        shown: dict[str, int | None] = {}
        with staged(out, sources) as (stage, written):
            for id, (judged, index) in places.items():
                batch = collate_scenes([judged[index]])
                self._one(id, batch, views[id], stage)
                shown[id] = shown_points(batch)
        _tell(shown, self.recipe.data.points)
        return written

    def _one(self, name: str, batch: SceneBatch, views: Sequence[View], out: Path) -> None:
        seen = infer(self.model, batch)
        kept = suppress(seen.detections[LAST], batch.points[0, :, :3], self.recipe.evaluation)
        plain, above = new_files(out, name, ".json", "_above.png")
        write_text(plain, json.dumps({"boxes": described(kept, self.classes)}, indent=1))
        shown = [] if batch.images is None else spread(views, self.recipe.data.views)
        ends = ["_boxes.png"] if len(shown) == 1 else [f"_boxes_{i}.png" for i in range(len(shown))]
        boxes = drawable(kept, self.classes)
        for path, view in zip(new_files(out, name, *ends) if ends else [], shown, strict=True):
            Image.fromarray(_over(view, self.spec.modalities[IMAGE], boxes)).save(path)
        Image.fromarray(_above(self.model, batch, seen, boxes)).save(above)
        self._save_scores(out, name, seen)

    def _save_scores(self, out: Path, name: str, seen: Seen) -> None:
        if not seen.output.keys:
            return
        (path,) = new_files(out, name, "_scores.npz")
        layers = {f"layer{i}": scored.scores[0].float().cpu().numpy() for i, scored in enumerate(seen.output.keys)}
        arrays = {"seed": seen.output.points.seeds.xyz[0].cpu().numpy(), **layers}
        save_npz(path, {"threshold": np.float32(self.model.threshold or 0.0), **arrays})


def shown_points(batch: SceneBatch) -> int | None:
    """How many of a scene's points some view shows; None where there is no view."""
    if batch.images is None or batch.projection is None or not batch.projection.any():
        return None
    size = (batch.images.shape[-2], batch.images.shape[-1])
    pixels, depth = project(batch.points[:, None, :, :3], batch.projection)
    return int(patch_index(pixels, depth, size, 1)[1].any(1).sum())


def _tell(shown: Mapping[str, int | None], points: int) -> None:
    """Print how many points images show, over all scenes that have some, and warn of scenes whose images show none."""
    counts = {name: count for name, count in shown.items() if count is not None}
    if counts:
        print(f"points that images show: {sum(counts.values())} of {points * len(counts)}", file=sys.stderr)
    blind = [name for name, count in counts.items() if count == 0]
    if blind:
        others = f" and {len(blind) - 1} more" if len(blind) > 1 else ""
        cause = "is the pose world to camera, where camera to upright is wanted, or K of another image size?"
        warn(f"{blind[0]}{others}: no image shows any point of the cloud; {cause}")


def described(found: Detections, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Boxes as the JSON file holds them, best first; score = objectness x probability of the class."""
    best = found.classes.argmax(1)
    score = found.objectness * found.classes.gather(1, best[:, None])[:, 0]
    return [
        {
            "class": classes[int(best[i])],
            "score": float(score[i]),
            "center": found.boxes[i, :3].tolist(),
            "size": found.boxes[i, 3:6].tolist(),
            "yaw_rad": float(found.boxes[i, 6]),
            "objectness": float(found.objectness[i]),
            "probabilities": dict(zip(classes, found.classes[i].tolist(), strict=True)),
        }
        for i in score.argsort(descending=True, stable=True).tolist()
    ]


def drawable(found: Detections, classes: Sequence[str]) -> Boxes:
    """The boxes that a picture shows, in their classes' colours: of several at one place, of whatever classes, the best.

    An infinite one has no place in it.
    """
    best = found.classes.argmax(1)
    score = found.objectness * found.classes.gather(1, best[:, None])[:, 0]
    places = corners(found.boxes)
    shown = ((found.objectness >= SHOWN) & places.isfinite().flatten(1).all(1)).nonzero()[:, 0].numpy()
    apart = nms3d(found.boxes[shown].numpy(), score[shown].numpy(), np.zeros(len(shown), int), ONE_PLACE)
    rows = sorted(shown[apart].tolist())
    names = [f"{classes[int(best[i])]} {score[i]:.2f}" for i in rows]
    return Boxes(places[rows].numpy(), names, default_palette(len(classes))[best[rows].numpy()])


def _over(view: View, spec: ModalitySpec, found: Boxes, truth: Boxes | None = None) -> np.ndarray:
    image = picture(read_image(view.image, spec), spec)
    return draw_boxes(image, projection_of(view.K, view.pose).numpy(), found, truth)


def _above(model: FusedDetector, batch: SceneBatch, seen: Seen, found: Boxes, truth: Boxes | None = None) -> np.ndarray:
    points = batch.points[0, :, :3]
    projections = [] if batch.projection is None else list(batch.projection[0].numpy())
    return draw_above(points.numpy(), found, truth, exchanged(model, seen, len(points)), projections)


def exchanged(model: FusedDetector, seen: Seen, count: int) -> np.ndarray | None:
    """Which points' tokens came from an image in any layer: bool [N]; None where no token was scored."""
    if not seen.output.keys or model.threshold is None:
        return None
    replaced = torch.stack([below(k.scores, model.threshold) & k.has for k in seen.output.keys]).any(0)[0].cpu()
    marked = np.zeros(count, bool)
    marked[seen.seeds[replaced].numpy()] = True
    return marked


def write_samples(model: FusedDetector, judged: Scenes, protocol: Protocol, out: Path) -> None:
    """Pictures of some evenly spaced scenes of a split, with the true boxes, as described by ``index.json``."""
    out.mkdir(parents=True, exist_ok=True)
    chosen = np.linspace(0, len(judged) - 1, min(SAMPLES, len(judged))).round().astype(int).tolist()
    judged.set_epoch(0)
    with evaluating(model):
        for number in chosen:
            _write_sample(model, judged, protocol, number, out)
    ids = [judged.ids[i].replace("/", "_") for i in chosen]
    modalities = [POINTS, IMAGE] if judged.has_images else [POINTS]
    palette = default_palette(len(judged.classes)).tolist()
    index = {
        "task": "detection3d",
        "ids": ids,
        "modalities": modalities,
        "blocks": [],
        "threshold": model.threshold,
        "least_objectness": SHOWN,
        "classes": [{"name": name, "color": color} for name, color in zip(judged.classes, palette, strict=True)],
    }
    write_text(out / "index.json", json.dumps(index, indent=1))


def _write_sample(model: FusedDetector, judged: Scenes, protocol: Protocol, number: int, out: Path) -> None:
    id, batch = judged.ids[number], collate_scenes([judged[number]])
    seen = infer(model, batch)
    found = drawable(suppress(seen.detections[LAST], batch.points[0, :, :3], protocol), judged.classes)
    assert batch.truth is not None
    mask = batch.truth.mask[0]
    truth = _truth(batch.truth.boxes[0][mask], batch.truth.labels[0][mask], judged.classes)
    pictures = {"picture/from above": _above(model, batch, seen, found, truth)}
    if judged.has_images:
        for row, view in enumerate(spread(judged.folder.read_views(id), judged.views)):
            name = "in the image" if judged.views == 1 else f"in view {row + 1}"
            pictures[f"picture/{name}"] = _over(view, judged.folder.modalities[IMAGE], found, truth)
    save_npz(out / f"{id.replace('/', '_')}.npz", pictures)


def _truth(boxes: Tensor, labels: Tensor, classes: Sequence[str]) -> Boxes:
    names = [classes[int(label)] for label in labels]
    return Boxes(corners(boxes).numpy(), names, default_palette(len(classes))[labels.numpy()])
