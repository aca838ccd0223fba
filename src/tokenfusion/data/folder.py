"""The one on-disk format: a folder, its dataset.yaml, and what is read from it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

import numpy as np
from torch import Tensor

from tokenfusion.data.cloud import Cloud, read_cloud
from tokenfusion.data.description import IGNORE, DatasetSpec, SceneSpec, TargetSpec, read_spec
from tokenfusion.data.image import check_sizes, decode, load_image, read_label
from tokenfusion.data.modality import ModalitySpec
from tokenfusion.data.picture import picture
from tokenfusion.data.prepare.archive import verify_manifest
from tokenfusion.data.scene import SceneBoxes, View, read_boxes, read_camera
from tokenfusion.errors import UserError, nearest
from tokenfusion.manifest import MANIFEST


class Folder:
    """A data set on disk. ``path`` is its folder, or a dataset.yaml that points to one.

    Errors: UserError that names the file and the key where something in dataset.yaml is wrong.
    """

    def __init__(self, path: Path | str) -> None:
        path = Path(path)
        self.file = path / "dataset.yaml" if path.is_dir() else path
        self.spec: DatasetSpec = read_spec(self.file)
        self.root = _resolve_root(self.file, self.spec.root)

    @property
    def name(self) -> str:
        return self.spec.name

    def fingerprint(self) -> str:
        """What tells these data from others of their name: of dataset.yaml, the ids, and the manifest where there is one."""
        manifest, parts = self.root / MANIFEST, [self.spec.model_dump_json(exclude={"root"})]
        for split in self.spec.splits:
            with suppress(UserError):  # whoever needs that split will say what is wrong with it
                parts.append(" ".join(self.ids(split)))
        parts += [manifest.read_text(encoding="utf-8")] if manifest.is_file() else []
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    @property
    def modalities(self) -> dict[str, ModalitySpec]:
        return self.spec.modalities

    @property
    def has_target(self) -> bool:
        return self.spec.target is not None

    @property
    def classes(self) -> list[str]:
        return [entry.name for entry in self.spec.classes]

    @property
    def palette(self) -> np.ndarray:
        """uint8 [K, 3]: the colours of dataset.yaml, and well separated ones where it names none."""
        return self.spec.palette

    def ids(self, split: str) -> list[str]:
        """The ids of a split in the order of its file."""
        if split not in self.spec.splits:
            raise UserError(f"{self.file}: no split {split!r}; known: {', '.join(self.spec.splits)}")
        entry = self.spec.splits[split]
        without = {name for file in entry.without for name in self._read_ids(file)}
        ids = [name for name in self._read_ids(entry.of) if name not in without]
        if not ids:
            raise UserError(f"{self.file}: split {split!r} has no ids ({entry.of}); write one id per line")
        return ids

    def select(self, modalities: Sequence[str]) -> dict[str, ModalitySpec]:
        """The specifications of some modalities, in the order asked for."""
        for name in modalities:
            if name not in self.modalities:
                raise UserError(f"{self.file}: no modality {name!r}; {nearest(name, self.modalities)}")
        return {name: self.modalities[name] for name in modalities}

    def image_path(self, id: str, modality: str) -> Path:
        return self.root / self.select([modality])[modality].files.replace("{id}", id)

    def target_path(self, id: str) -> Path:
        return self.root / self._target().files.replace("{id}", id)

    def read(self, id: str, modalities: Sequence[str]) -> dict[str, Tensor]:
        """Physical units before normalisation, float32: rgb [3, H, W] in 0..255, depth [1, H, W] in metres, ..."""
        images = self.load(id, modalities)
        return {name: decode(image, self.modalities[name]) for name, image in images.items()}

    def load(self, id: str, modalities: Sequence[str]) -> dict[str, Tensor]:
        """As ``read``, in the working form of ``modality.load_image``: 8-bit images stay uint8."""
        specs = self.select(modalities)
        paths = {name: self.image_path(id, name) for name in specs}
        images = {name: load_image(paths[name], spec) for name, spec in specs.items()}
        check_sizes(paths, images)
        return {name: self._crop(image, paths[name]) for name, image in images.items()}

    def read_target(self, id: str) -> Tensor:
        """Class ids int64 [H, W], 255 = ignore.

        Errors: UserError that names the file and the first label that is no class.
        """
        spec, path = self._target(), self.target_path(id)
        stored = self._crop(read_label(path), path)
        without_class = [value for value in (spec.ignore, *spec.unlabelled) if value is not None]
        target, last = stored + spec.offset, len(self.spec.classes) - 1
        outside = (target < 0) | (target > last)
        for value in without_class:
            named = stored == value
            target[named] = IGNORE
            outside &= ~named
        if outside.any():
            raise UserError(
                f"{path}: holds the label {int(stored[outside][0])}; wanted {-spec.offset}..{last - spec.offset}"
                f" ({last + 1} classes) or one of {without_class} for no class: correct the file, or "
                f"target.offset and target.unlabelled in {self.file}"
            )
        return target

    @property
    def scene(self) -> SceneSpec:
        """What dataset.yaml says of point clouds, boxes and cameras; a UserError where it says nothing."""
        if self.spec.scene is None:
            raise UserError(f"{self.file}: has no scene; add 'scene: {{points: ..., boxes: ..., classes: [...]}}'")
        return self.spec.scene

    def scene_path(self, id: str, key: str) -> Path:
        """The file of ``points``, ``boxes``, ``camera`` or ``instance``."""
        if key not in self.scene.files:
            raise UserError(f"{self.file}: has no scene.{key}; add its file pattern, for example {key}/{{id}}.json")
        return self.root / self.scene.files[key].replace("{id}", id)

    def read_cloud(self, id: str) -> Cloud:
        """Points float32 [P, 3] or [P, 6], and the row of each point's box where ``scene.instance`` tells it."""
        instance = self.scene_path(id, "instance") if self.scene.instance else None
        return read_cloud(self.scene_path(id, "points"), instance)

    def read_boxes(self, id: str) -> SceneBoxes:
        """The boxes of a scene; their classes are those of ``scene.classes``."""
        path = self.scene_path(id, "boxes")
        found = read_boxes(path)
        for name in found.names:
            if name not in self.scene.classes:
                known = nearest(name, self.scene.classes)
                raise UserError(f"{path}: a box has the class {name!r}, which {self.file} does not name; {known}")
        return found

    def read_views(self, id: str) -> list[View]:
        """The images of a scene with their cameras: that of ``modalities.rgb``, or those that the camera file lists."""
        image = self.image_path(id, "rgb") if "rgb" in self.modalities else None
        return read_camera(self.scene_path(id, "camera"), image, self.root)

    def display(self, id: str, modality: str) -> np.ndarray:
        """A picture for people: uint8 [H, W, 3]."""
        return picture(self.read(id, [modality])[modality], self.modalities[modality])

    def verify(self, show_progress: bool = False) -> int:
        """Check every file against MANIFEST.sha256 and return how many there are; a UserError names a damaged one."""
        return verify_manifest(self.root, show_progress)

    def _target(self) -> TargetSpec:
        if self.spec.target is None:
            raise UserError(f"{self.file}: has no target; add 'target: {{kind: label, files: ...}}'")
        return self.spec.target

    def _crop(self, image: Tensor, path: Path) -> Tensor:
        if self.spec.crop is None:
            return image
        top, bottom, left, right = self.spec.crop
        height, width = image.shape[-2:]
        if bottom > height or right > width:
            raise UserError(f"{path}: is {height}x{width}, too small for crop {list(self.spec.crop)} in {self.file}")
        return image[..., top:bottom, left:right]

    def _read_ids(self, file: str) -> list[str]:
        path = next((place / file for place in (self.file.parent, self.root) if (place / file).is_file()), None)
        if path is None:
            raise UserError(f"{self.root / file}: no such file; {self.file} names it as a split")
        try:
            ids = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read ({error})") from None
        seen: set[str] = set()
        for name in ids:
            if name in seen:
                raise UserError(f"{path}: the id {name!r} stands there twice; remove one")
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise UserError(f"{path}: the id {name!r} leaves the data set's folder; ids are plain names")
            seen.add(name)
        return ids


def _resolve_root(file: Path, root: str) -> Path:
    expanded = os.path.expandvars(root)
    if "$" in expanded:
        raise UserError(f"{file}: root is {root!r}, but that environment variable is not set; export it first")
    path = file.parent / expanded  # an absolute root stands for itself
    if not path.is_dir():
        raise UserError(f"{file}: root is {root!r}, but {path} is no folder")
    return path
