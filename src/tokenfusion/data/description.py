"""dataset.yaml: its keys, what they may hold, and how it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from tokenfusion.data.modality import ModalitySpec
from tokenfusion.data.picture import oklch
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


class SceneSpec(BaseModel):
    """Where the point cloud of an id is, its boxes and camera, and the classes that boxes have."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    points: str
    boxes: str | None = None
    camera: str | None = None
    instance: str | None = None
    classes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> SceneSpec:
        if self.boxes is not None and not self.classes:
            raise ValueError("scene.classes: is missing; boxes need the names of their classes")
        if self.instance is not None and self.boxes is None:
            raise ValueError("scene.boxes: is missing; scene.instance holds rows of the boxes")
        if len(set(self.classes)) < len(self.classes):
            twice = max(self.classes, key=self.classes.count)
            raise ValueError(f"scene.classes: {twice!r} stands there twice")
        return self

    @property
    def files(self) -> dict[str, str]:
        """The patterns that are given."""
        patterns = {key: getattr(self, key) for key in ("points", "boxes", "camera", "instance")}
        return {key: pattern for key, pattern in patterns.items() if pattern is not None}


class DatasetSpec(BaseModel):
    """The content of dataset.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    root: str = "."
    modalities: dict[str, ModalitySpec] = {}
    scene: SceneSpec | None = None
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
        if not self.modalities and self.scene is None:
            raise ValueError("modalities: is empty; name at least one")
        patterns = {f"modalities.{name}.files": entry.files for name, entry in self.modalities.items()}
        if self.target is not None:
            patterns["target.files"] = self.target.files
        if self.scene is not None:
            patterns |= {f"scene.{key}": pattern for key, pattern in self.scene.files.items()}
        for key, pattern in patterns.items():
            if "{id}" not in pattern or "{" in pattern.replace("{id}", ""):
                raise ValueError(f"{key} is {pattern!r}; it must hold {{id}}, and no other braces")
        if self.target is not None and not names:
            raise ValueError("classes: is missing; a label target needs the names of its classes")
        if len(set(names)) < len(names):
            raise ValueError(f"classes: {max(names, key=names.count)!r} stands there twice")
        if len(names) >= IGNORE:
            raise ValueError(f"classes: {len(names)} of them; at most {IGNORE - 1} are possible")
        if self.crop is not None and not (0 <= self.crop[0] < self.crop[1] and 0 <= self.crop[2] < self.crop[3]):
            raise ValueError(f"crop is {list(self.crop)}; wanted [row0, row1, col0, col1], each pair rising from 0 on")
        if self.crop is not None and self.scene is not None:
            raise ValueError("crop: cannot go together with scene, whose cameras know the whole image; leave it out")
        return self

    @property
    def palette(self) -> np.ndarray:
        """uint8 [K, 3]: a colour per class, a default one where none is named."""
        colours = default_palette(len(self.classes))
        for index, entry in enumerate(self.classes):
            if entry.color is not None:
                colours[index] = entry.color
        return colours


def default_palette(count: int) -> np.ndarray:
    """uint8 [count, 3]: hues a golden angle apart, three lightnesses in turn, so that neighbours differ."""
    index = np.arange(count)
    return oklch(np.array([0.68, 0.82, 0.52])[index % 3], np.full(count, 0.12), 30.0 + index * 137.508)


def read_spec(file: Path) -> DatasetSpec:
    """Read and check one dataset.yaml.

    Errors: UserError that names the file and the first wrong key, with the nearest valid one.
    """
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
            "scene": SceneSpec,
        }
        model = models[place[0]] if len(place) > 1 else DatasetSpec
        return f"unknown key {'.'.join(place)!r}; {nearest(place[-1], model.model_fields)}"
    if first["type"] == "missing":
        return f"the key {'.'.join(place)!r} is missing"
    message = first["msg"].removeprefix("Value error, ")
    came = "" if first["type"] == "value_error" else f" (came: {str(first['input'])[:60]!r})"
    return f"{'.'.join(place)}: {message}{came}" if place else message
