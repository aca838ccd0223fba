"""Label images, colour overlays and scores for one's own files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from tokenfusion.data.folder import DatasetSpec, Folder, default_palette
from tokenfusion.data.modality import ModalitySpec, picture, prepare_inputs, read_inputs
from tokenfusion.errors import UserError, nearest
from tokenfusion.tasks.segmentation.inference import Evaluation, Inference, infer
from tokenfusion.tasks.segmentation.model import FusedSegmenter
from tokenfusion.tasks.segmentation.samples import save_npz, score_maps


class Predictor:
    """Writes ``ID.png`` (class ids), ``ID_overlay.png`` and ``ID_scores.npz`` per image, each whole or not at all.

    Args:
        model: in eval mode.
        spec: the data set description that the run was trained with: how files are read, classes, colours.
        protocol: as in evaluation.
        resize: (rows, columns) of the network's inputs, None = as they are. Predictions always have the image's size.
    """

    def __init__(
        self, model: FusedSegmenter, spec: DatasetSpec, protocol: Evaluation, resize: tuple[int, int] | None
    ) -> None:
        self.model, self.spec, self.protocol, self.resize = model, spec, protocol, resize
        self.palette = default_palette(len(spec.classes))
        for index, entry in enumerate(spec.classes):
            if entry.color is not None:
                self.palette[index] = entry.color

    def files(self, files: Mapping[str, Path], out: Path) -> list[Path]:
        """Predict on one image given as a file per modality; modalities may be left out."""
        for name in files:
            if name not in self.model.modalities:
                raise UserError(f"{name}=...: this run has no such modality; {nearest(name, self.model.modalities)}")
        specs = {name: self.spec.modalities[name] for name in self.model.modalities if name in files}
        raw = read_inputs({name: files[name] for name in specs}, specs)
        return self._one(next(iter(files.values())).stem, raw, specs, out)

    def folder(self, folder: Folder, split: str | None, out: Path) -> list[Path]:
        """Predict on a split of a data set folder, or on all of its ids; every file is read before the first is written."""
        splits = [split] if split else list(folder.spec.splits)
        ids = list(dict.fromkeys(name for s in splits for name in folder.ids(s)))
        names = [name for name in self.model.modalities if name in folder.modalities]
        if not names:
            raise UserError(f"{folder.file}: has none of the run's modalities {', '.join(self.model.modalities)}")
        missing = [p for i in ids for n in names if not (p := folder.image_path(i, n)).is_file()]
        if missing:
            raise UserError(f"{missing[0]}: no such file, and {len(missing) - 1} more are missing")
        specs = folder.select(names)
        return [path for i in ids for path in self._one(i.replace("/", "_"), folder.read(i, names), specs, out)]

    def _one(self, name: str, raw: dict[str, Tensor], specs: dict[str, ModalitySpec], out: Path) -> list[Path]:
        size = next(iter(raw.values())).shape[-2:]
        inputs = prepare_inputs(raw, specs, self.resize)
        network = next(iter(inputs.values())).shape[-2:]
        smallest = self.model.backbone.backbone.smallest
        if min(network) < smallest:
            raise UserError(f"{name}: the image is {network[0]}x{network[1]}; at least {smallest}x{smallest} is wanted")
        device = next(self.model.parameters()).device
        seen = infer(self.model, {n: x.to(device) for n, x in inputs.items()}, size, self.protocol)
        return self._write(name, seen, picture(*self._background(raw, specs)), (int(network[0]), int(network[1])), out)

    @staticmethod
    def _background(raw: dict[str, Tensor], specs: dict[str, ModalitySpec]) -> tuple[Tensor, ModalitySpec]:
        name = next((n for n, spec in specs.items() if spec.kind == "rgb"), next(iter(raw)))
        return raw[name], specs[name]

    def _write(
        self, name: str, seen: Inference, background: np.ndarray, network: tuple[int, int], out: Path
    ) -> list[Path]:
        out.mkdir(parents=True, exist_ok=True)
        labels = seen.predictions["ensemble"].cpu().numpy().astype(np.uint8)
        overlay = (0.45 * background + 0.55 * self.palette[labels]).round().astype(np.uint8)
        scores = score_maps(self.model.backbone, seen.scores, network)
        paths = [out / f"{name}.png", out / f"{name}_overlay.png"]
        _whole(paths[0], lambda part: Image.fromarray(labels).save(part, "png"))
        _whole(paths[1], lambda part: Image.fromarray(overlay).save(part, "png"))
        if scores:
            paths.append(out / f"{name}_scores.npz")
            threshold = np.float32(self.model.backbone.threshold or 0.0)
            names = np.array(self.model.modalities)
            _whole(paths[2], lambda part: save_npz(part, {"modalities": names, "threshold": threshold, **scores}))
        return paths


def _whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write to a temporary name, then rename: a reader never meets half a file."""
    part = path.with_name(f".{path.name}.partial")
    try:
        write(part)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
