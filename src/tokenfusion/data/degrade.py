"""Inputs that are missing or worse than they were, to judge models by.

What befalls a file is a function of its frame's id and its modality, and happens to what was read from it, before it is resized
and normalised: it means the same to every model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from tokenfusion.data.chance import seeded
from tokenfusion.data.cloud import Cloud
from tokenfusion.data.image import measured
from tokenfusion.data.modality import ModalitySpec
from tokenfusion.errors import UserError, nearest

POINTS = "points"
FITTING = {"rgb": ("noise", "shift", "dark"), "depth": ("noise", "shift", "holes"), POINTS: ("noise", "holes")}
OTHERS = ("noise", "shift")  # fit every other kind of image
NEAREST_M = 0.001  # measured depth stays depth, whatever is added to it
BLOB = 4  # pixels between the supports of the map that holes are cut from
LUMP_M = 0.25  # side of the cubes that holes in a cloud are made of


class Degradation(BaseModel):
    """What one modality suffers.

    Attributes:
        kind: ``noise``: Gaussian. ``shift``: the image moves right and down against labels and other modalities. ``dark``: rgb
            times 1 - amount, in 8 bits. ``holes``: depth or points are missing in blobs.
        amount: of noise the standard deviation, in metres (depth, points), as a share of the full range (rgb), else in the
            modality's own unit; of a shift pixels of the file; of dark and holes a share.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["noise", "shift", "dark", "holes"]
    amount: float = Field(gt=0, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        unknown = set(value) - set(cls.model_fields) if isinstance(value, Mapping) else None
        if unknown or unknown is None:
            raise ValueError("wanted {kind: noise, shift, dark or holes, amount: a number}")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Degradation:
        if self.kind == "shift" and self.amount % 1:
            raise ValueError(f"amount is {self.amount:g}; a shift wants whole pixels")
        if self.kind in ("dark", "holes") and self.amount > 1:
            raise ValueError(f"amount is {self.amount:g}; {self.kind} wants a share, above 0 and up to 1")
        return self


class Conditions(BaseModel):
    """Under which inputs a model is judged.

    Attributes:
        missing: modalities that the model is not given.
        degrade: what the others suffer, by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    missing: tuple[str, ...] = ()
    degrade: dict[str, Degradation] = {}

    @field_validator("missing", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError("wanted a list of names, as [depth]")
        return value

    @property
    def are_plain(self) -> bool:
        """Whether every file is given as it is."""
        return not self.missing and not self.degrade

    def told(self) -> str:
        """What is missing and worse, as the end of a protocol's line; empty where they are plain."""
        parts = [f"without {' and '.join(self.missing)}"] if self.missing else []
        parts += [f"{name} with {how.kind} {how.amount:g}" for name, how in self.degrade.items()]
        return "".join(f", {part}" for part in parts)

    def given(self, kinds: Mapping[str, str]) -> tuple[str, ...]:
        """Check the conditions against the inputs that there are; the names of those that the model is given.

        Args:
            kinds: of all modalities, by name; ``points`` is the kind of a cloud.

        Raises:
            UserError: where a name is none of them, nothing would be left, or a degradation does not fit its modality.
        """
        for key, names in (("missing", self.missing), ("degrade", self.degrade)):
            for name in names:
                if name not in kinds:
                    raise UserError(f"evaluation.{key} names {name!r}, which is no input here; {nearest(name, kinds)}")
        left = tuple(name for name in kinds if name not in self.missing)
        if not left:
            raise UserError(f"evaluation.missing is {list(self.missing)}, which is every input; leave one")
        for name, how in self.degrade.items():
            if name in self.missing:
                raise UserError(f"evaluation.degrade names {name!r}, which evaluation.missing leaves out; choose one")
            fitting = FITTING.get(kinds[name], OTHERS)
            if how.kind not in fitting:
                raise UserError(
                    f"evaluation.degrade.{name}.kind is {how.kind!r}; {kinds[name]} can have {', '.join(fitting)}"
                )
        return left


PLAIN = Conditions()


def degraded(image: Tensor, spec: ModalitySpec, how: Degradation, id: str, name: str) -> Tensor:
    """A physical image [C, H, W] made worse; rgb stays in whole steps of 0..255, what was not measured stays so."""
    generator = seeded(0, id, name)
    if how.kind == "shift":
        return _shifted(image, int(how.amount), repeats=spec.modality.missing is None and not spec.modality.is_vector)
    if how.kind == "dark":
        return (image * (1.0 - how.amount)).round()
    if how.kind == "holes":
        return _with_holes(image, how.amount, generator)
    return _noisy(image, spec, how.amount, generator)


def _noisy(image: Tensor, spec: ModalitySpec, deviation: float, generator: torch.Generator) -> Tensor:
    noise = deviation * torch.randn(image.shape, generator=generator)
    if spec.kind == "rgb":
        return (image + 255.0 * noise).round().clamp(0.0, 255.0)
    noisy = image + noise
    if spec.kind == "depth":
        noisy = noisy.clamp(min=NEAREST_M)
    elif spec.modality.is_vector:
        noisy = F.normalize(noisy, dim=0)
    return noisy * measured(image, spec)


def _shifted(image: Tensor, pixels: int, repeats: bool) -> Tensor:
    """Right and down; behind it the edge is repeated, or nothing was measured (0)."""
    rows, columns = (torch.arange(n).sub(pixels).clamp(min=0) for n in image.shape[-2:])
    moved = image[:, rows][:, :, columns]
    if not repeats:
        moved[:, :pixels] = 0.0
        moved[:, :, :pixels] = 0.0
    return moved


def _with_holes(depth: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """So many of the measured pixels, to one, become 0 = missing: where a smooth random map is highest."""
    rows, columns = depth.shape[-2:]
    coarse = torch.rand(1, 1, rows // BLOB + 2, columns // BLOB + 2, generator=generator)
    smooth = F.interpolate(coarse, size=(rows, columns), mode="bilinear", align_corners=False).flatten()
    known = depth.flatten().nonzero().squeeze(1)
    holes = known[smooth[known].topk(round(share * len(known))).indices]
    return depth.flatten().index_fill(0, holes, 0.0).view_as(depth)


def degraded_cloud(cloud: Cloud, how: Degradation, id: str) -> Cloud:
    """A cloud made worse: coordinates with noise, or without the points of some cubes, at least one point left."""
    generator = seeded(0, id, POINTS)
    xyz = cloud.points[:, :3]
    if how.kind == "noise":
        noisy = xyz + how.amount * torch.randn(xyz.shape, generator=generator)
        return cloud._replace(points=torch.cat([noisy, cloud.points[:, 3:]], 1))
    cubes, cube = (xyz / LUMP_M).floor().unique(dim=0, return_inverse=True)
    order = torch.randperm(len(cubes), generator=generator)[cube].argsort(stable=True)
    dropped = min(round(how.amount * len(xyz)), len(xyz) - 1)
    rows = order[dropped:].sort().values
    return Cloud(cloud.points[rows], None if cloud.box is None else cloud.box[rows])
