"""What a modality is: what its files hold, its unit, and how networks see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from tokenfusion.errors import nearest

Pair = tuple[float, float]
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Modality:
    """One kind of image: everything that reading, augmenting and normalising must know about it."""

    stored: int  # channels in the file
    unit: str  # of the physical values that reading returns
    mean: Triple  # network input = (physical - mean) / std, tiled to `channels`
    std: Triple
    interpolation: Literal["bilinear", "nearest"]
    range: Pair  # physical values that become -1..1 for translation; depth: see ``inputs.to_tanh``
    scale: float | None = None  # physical = stored x scale for integer files; None = the full range becomes 0..1
    zero: float = 0.0  # stored value of physical 0: physical = (stored - zero) x scale
    missing: float | None = None  # stored value that means "not measured"; physical 0
    is_vector: bool = False  # channel 0 points to the right: negated when the image is flipped
    colour_mapped: bool = False  # pictures for people use a colour map
    channels: int = 3  # as the network sees it


IMAGENET_MEAN: Triple = (123.675, 116.28, 103.53)
IMAGENET_STD: Triple = (58.395, 57.12, 57.375)
ZERO: Triple = (0.0, 0.0, 0.0)
ONE: Triple = (1.0, 1.0, 1.0)
HALF: Triple = (0.5, 0.5, 0.5)
QUARTER: Triple = (0.25, 0.25, 0.25)

MODALITIES: dict[str, Modality] = {
    "rgb": Modality(3, "0..255", IMAGENET_MEAN, IMAGENET_STD, "bilinear", (0.0, 255.0), scale=1.0),
    "depth": Modality(
        1, "metres", ZERO, (5.0, 5.0, 5.0), "nearest", (1.0, 10.0), scale=0.001, missing=0.0, colour_mapped=True
    ),
    "thermal": Modality(1, "0..1", HALF, QUARTER, "bilinear", (0.0, 1.0), colour_mapped=True),
    "normal": Modality(3, "unit vector", ZERO, ONE, "nearest", (-1.0, 1.0), is_vector=True),
    "curvature": Modality(3, "-1..1", ZERO, ONE, "bilinear", (-1.0, 1.0), scale=1.0 / 128.0, zero=127.0),
    "gray": Modality(1, "0..1", HALF, QUARTER, "bilinear", (0.0, 1.0)),
}


class ModalitySpec(BaseModel):
    """One entry under ``modalities`` in dataset.yaml; what is left out comes from ``MODALITIES[kind]``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    files: str = "{id}"
    scale: float | None = None
    missing: float | None = None
    mean: Triple | None = None
    std: Triple | None = None
    range: Pair | None = None

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        if kind not in MODALITIES:
            raise ValueError(f"{kind!r} is no kind of modality: {nearest(kind, MODALITIES)}")
        return kind

    @field_validator("mean", "std", mode="before")
    @classmethod
    def _tile(cls, value: object) -> object:
        return [value] * 3 if isinstance(value, int | float) else value

    @model_validator(mode="after")
    def _consistent(self) -> ModalitySpec:
        for key in ("scale", "range"):
            if self.kind in ("rgb", "normal", "curvature") and getattr(self, key) is not None:
                raise ValueError(f"{key}: {self.kind} has a fixed unit; leave the key out")
        if self.missing is not None and self.modality.missing is None:
            raise ValueError(f"missing: only depth has missing values, not {self.kind}; leave the key out")
        if self.scale is not None and not 0 < self.scale < float("inf"):
            raise ValueError(f"scale is {self.scale}, it must be above 0")
        if self.std is not None and not all(0 < value < float("inf") for value in self.std):
            raise ValueError(f"std is {self.std}, it must be above 0")
        low, high = self.limits
        if not (low < high < float("inf") and (low > 0 if self.kind == "depth" else low > -float("inf"))):
            wanted = "[near, far] with 0 < near < far" if self.kind == "depth" else "[low, high] with low < high"
            raise ValueError(f"range is {[low, high]}; wanted {wanted}")
        return self

    @property
    def limits(self) -> Pair:
        """The physical range that becomes -1..1: (low, high), for depth (near, far) in metres."""
        return self.range or self.modality.range

    @property
    def modality(self) -> Modality:
        return MODALITIES[self.kind]

    @property
    def missing_value(self) -> float | None:
        """The stored value that means "not measured"; 0 metres means it whatever the value."""
        return self.modality.missing if self.missing is None else self.missing
