"""The one on-disk format: a folder, its dataset.yaml, and what is read from it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator
from torch import Tensor

from tokenfusion.data.image import check_sizes, decode, load_image, read_label
from tokenfusion.data.modality import ModalitySpec
from tokenfusion.data.picture import oklch, picture
from tokenfusion.data.prepare.archive import verify_manifest
from tokenfusion.errors import UserError, nearest

IGNORE = 255  # what the loss and the metrics leave out


class TargetSpec(BaseModel):
    """Where the labels are; stored value + offset = class id, except for the values that name no class."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["label"] = "label"
    files: str
    ignore: int | None = 255
    unlabelled: tuple[int, ...] = ()
    offset: int = 0

    @field_validator("unlabelled", mode="before")
    @classmethod
    def _several(cls, value: object) -> object:
        return [value] if isinstance(value, int) else value


class ClassSpec(BaseModel):
    """One class: a name and, where wanted, its colour in pictures."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    color: tuple[int, int, int] | None = None

    @field_validator("color")
    @classmethod
    def _in_range(cls, color: tuple[int, int, int] | None) -> tuple[int, int, int] | None:
        if color is not None and not all(0 <= value <= 255 for value in color):
            raise ValueError(f"colour {list(color)} is outside 0..255")
        return color


class SplitSpec(BaseModel):
    """A list of ids, less the ids of other lists."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    of: str
    without: tuple[str, ...] = ()

    @field_validator("without", mode="before")
    @classmethod
    def _several(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value


class DatasetSpec(BaseModel):
    """The content of dataset.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    root: str = "."
    modalities: dict[str, ModalitySpec]
    target: TargetSpec | None = None
    classes: tuple[ClassSpec, ...] = ()
    splits: dict[str, SplitSpec]
    crop: tuple[int, int, int, int] | None = None

    @field_validator("classes", mode="before")
    @classmethod
    def _names_alone(cls, value: object) -> object:
        if not isinstance(value, list | tuple):
            return value
        return [{"name": entry} if isinstance(entry, str) else entry for entry in value]

    @field_validator("splits", mode="before")
    @classmethod
    def _files_alone(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {name: {"of": split} if isinstance(split, str) else split for name, split in value.items()}

    @model_validator(mode="after")
    def _consistent(self) -> DatasetSpec:
        names = [entry.name for entry in self.classes]
        if not self.modalities:
            raise ValueError("modalities: is empty; name at least one")
        patterns = {f"modalities.{name}": entry.files for name, entry in self.modalities.items()}
        if self.target is not None:
            patterns["target"] = self.target.files
        for key, pattern in patterns.items():
            if "{id}" not in pattern or "{" in pattern.replace("{id}", ""):
                raise ValueError(f"{key}.files is {pattern!r}; it must hold {{id}}, and no other braces")
        if self.target is not None and not names:
            raise ValueError("classes: is missing; a label target needs the names of its classes")
        if len(set(names)) < len(names):
            raise ValueError(f"classes: {max(names, key=names.count)!r} stands there twice")
        if len(names) >= IGNORE:
            raise ValueError(f"classes: {len(names)} of them; at most {IGNORE - 1} are possible")
        if self.crop is not None and not (0 <= self.crop[0] < self.crop[1] and 0 <= self.crop[2] < self.crop[3]):
            raise ValueError(f"crop is {list(self.crop)}; wanted [row0, row1, col0, col1], each pair rising from 0 on")
        return self

    @property
    def palette(self) -> np.ndarray:
        """uint8 [K, 3]: a colour per class, a default one where none is named."""
        colours = default_palette(len(self.classes))
        for index, entry in enumerate(self.classes):
            if entry.color is not None:
                colours[index] = entry.color
        return colours


class Folder:
    """A data set on disk. ``path`` is its folder, or a dataset.yaml that points to one.

    Errors: UserError that names the file and the key where something in dataset.yaml is wrong.
    """

    def __init__(self, path: Path | str) -> None:
        path = Path(path)
        self.file = path / "dataset.yaml" if path.is_dir() else path
        self.spec = _read_spec(self.file)
        self.root = _resolve_root(self.file, self.spec.root)

    @property
    def name(self) -> str:
        return self.spec.name

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


def default_palette(count: int) -> np.ndarray:
    """uint8 [count, 3]: hues a golden angle apart, three lightnesses in turn, so that neighbours differ."""
    index = np.arange(count)
    return oklch(np.array([0.68, 0.82, 0.52])[index % 3], np.full(count, 0.12), 30.0 + index * 137.508)


def _read_spec(file: Path) -> DatasetSpec:
    try:
        content: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; a data set is a folder with a dataset.yaml") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds no keys; wanted name, modalities, splits, ...")
    try:
        return DatasetSpec.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{file}: {_explain(error)}") from None


def _explain(error: ValidationError) -> str:
    """The first problem in one line; for an unknown key the nearest valid one."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        models: dict[str, type[BaseModel]] = {
            "modalities": ModalitySpec,
            "target": TargetSpec,
            "classes": ClassSpec,
            "splits": SplitSpec,
        }
        model = models[place[0]] if len(place) > 1 else DatasetSpec
        return f"unknown key {'.'.join(place)!r}; {nearest(place[-1], model.model_fields)}"
    if first["type"] == "missing":
        return f"the key {'.'.join(place)!r} is missing"
    message = first["msg"].removeprefix("Value error, ")
    came = "" if first["type"] == "value_error" else f" (came: {str(first['input'])[:60]!r})"
    return f"{'.'.join(place)}: {message}{came}" if place else message


def _resolve_root(file: Path, root: str) -> Path:
    expanded = os.path.expandvars(root)
    if "$" in expanded:
        raise UserError(f"{file}: root is {root!r}, but that environment variable is not set; export it first")
    path = file.parent / expanded  # an absolute root stands for itself
    if not path.is_dir():
        raise UserError(f"{file}: root is {root!r}, but {path} is no folder")
    return path
