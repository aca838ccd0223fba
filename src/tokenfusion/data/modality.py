"""What a modality is: how its files are read, its unit, and how the network sees it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, field_validator, model_validator
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from tokenfusion.errors import UserError, nearest

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Modality:
    """One kind of image: everything that reading, augmenting and normalising must know about it."""

    stored: int  # channels in the file
    unit: str  # of the physical values that reading returns
    mean: Triple  # network input = (physical - mean) / std, tiled to `channels`
    std: Triple
    interpolation: Literal["bilinear", "nearest"]
    scale: float | None = None  # physical = stored x scale for integer files; None = the full range becomes 0..1
    missing: float | None = None  # stored value that means "not measured"; physical 0
    is_vector: bool = False  # channel 0 points to the right: negated when the image is flipped
    colour_mapped: bool = False  # pictures for people use a colour map
    channels: int = 3  # as the network sees it


IMAGENET_MEAN: Triple = (123.675, 116.28, 103.53)
IMAGENET_STD: Triple = (58.395, 57.12, 57.375)
HALF: Triple = (0.5, 0.5, 0.5)
QUARTER: Triple = (0.25, 0.25, 0.25)

MODALITIES: dict[str, Modality] = {
    "rgb": Modality(3, "0..255", IMAGENET_MEAN, IMAGENET_STD, "bilinear", scale=1.0),
    "depth": Modality(
        1, "metres", (0.0, 0.0, 0.0), (5.0, 5.0, 5.0), "nearest", scale=0.001, missing=0.0, colour_mapped=True
    ),
    "thermal": Modality(1, "0..1", HALF, QUARTER, "bilinear", colour_mapped=True),
    "normal": Modality(3, "unit vector", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "nearest", is_vector=True),
    "gray": Modality(1, "0..1", HALF, QUARTER, "bilinear"),
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
        if self.kind in ("rgb", "normal") and self.scale is not None:
            raise ValueError(f"scale: {self.kind} has a fixed unit; leave the key out")
        if self.missing is not None and self.modality.missing is None:
            raise ValueError(f"missing: only depth has missing values, not {self.kind}; leave the key out")
        if self.scale is not None and not 0 < self.scale < float("inf"):
            raise ValueError(f"scale is {self.scale}, it must be above 0")
        if self.std is not None and not all(0 < value < float("inf") for value in self.std):
            raise ValueError(f"std is {self.std}, it must be above 0")
        return self

    @property
    def modality(self) -> Modality:
        return MODALITIES[self.kind]

    @property
    def missing_value(self) -> float | None:
        """The stored value that means "not measured"; 0 metres means it whatever the value."""
        return self.modality.missing if self.missing is None else self.missing


def read_image(path: Path | str, spec: ModalitySpec) -> Tensor:
    """Read one file in physical units: float32 [3, H, W] for rgb (0..255) and normal (unit vectors), else [1, H, W].

    Errors: UserError that names the file, see ``load_image``.
    """
    return decode(load_image(path, spec), spec)


def read_inputs(paths: dict[str, Path], specs: dict[str, ModalitySpec]) -> dict[str, Tensor]:
    """Read one file per modality as ``read_image`` does; all must have the same height and width."""
    images = {name: read_image(path, specs[name]) for name, path in paths.items()}
    check_sizes(paths, images)
    return images


def load_image(path: Path | str, spec: ModalitySpec) -> Tensor:
    """Read one file in its working form: uint8 [C, H, W] as stored (8-bit rgb, normal, gray) or physical float32.

    Working on bytes as long as possible is what keeps augmentation fast; ``decode`` turns both forms to physical.

    Errors: UserError that names the file where it is missing, damaged, has the wrong channels, or is a depth image
    with values that are not finite, below zero, or missing everywhere.
    """
    kind, path = spec.kind, Path(path)
    values = _to_channels(_read_array(path, keep_palette=False), path, kind, spec.modality.stored)
    if kind == "depth":
        return _depth_metres(values, path, spec)
    if values.dtype == np.uint8:
        return torch.from_numpy(np.array(values.transpose(2, 0, 1), order="C"))  # a copy: Pillow's is read-only
    if kind in ("rgb", "normal") and values.dtype.kind != "f":
        raise UserError(f"{path}: {kind} must be stored in 8 bits, this file holds {values.dtype}")
    scale = 1.0 if values.dtype.kind == "f" else spec.scale or 1.0 / np.iinfo(values.dtype).max
    physical = torch.from_numpy(np.array(values.transpose(2, 0, 1), dtype=np.float32, order="C"))
    if not physical.isfinite().all():
        raise UserError(f"{path}: holds values that are not finite (NaN or infinite); mend the file")
    return physical * scale if scale != 1.0 else physical


def decode(image: Tensor, spec: ModalitySpec) -> Tensor:
    """Working form [C, H, W] -> physical float32 [C, H, W]; float32 is physical already."""
    if image.dtype != torch.uint8:
        return image
    if spec.kind == "rgb":
        return image.float()
    if spec.kind == "normal":
        vectors = torch.nn.functional.normalize(image.float() / 127.5 - 1.0, dim=0)
        return vectors * (image != 0).any(dim=0)  # black = no surface: the zero vector
    return image.float() * (spec.scale or 1.0 / 255.0)


def prepare_inputs(
    raw: dict[str, Tensor], specs: dict[str, ModalitySpec], resize: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Physical images -> what the network takes: {name: float32 [3, H, W]}, resized to (height, width) where given.

    Evaluation and prediction both go through here, so that their inputs are equal to the bit.
    """
    if resize is not None:
        raw = {name: resize_image(image, resize, specs[name].modality.interpolation) for name, image in raw.items()}
    return normalise(raw, specs)


def normalise(raw: dict[str, Tensor], specs: dict[str, ModalitySpec]) -> dict[str, Tensor]:
    """Physical {name: [C, H, W]} -> {name: float32 [3, H, W]}: (value - mean) / std; depth 0 = missing stays 0."""
    return {name: _normalise(image, specs[name]) for name, image in raw.items()}


def _normalise(image: Tensor, spec: ModalitySpec) -> Tensor:
    mean = torch.tensor(spec.mean or spec.modality.mean).view(3, 1, 1)
    std = torch.tensor(spec.std or spec.modality.std).view(3, 1, 1)
    normalised = (image - mean) / std
    if spec.modality.missing is not None and bool(mean.any()):
        normalised = torch.where(image == 0, torch.zeros(()), normalised)
    return normalised


def resize_image(image: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Resize [C, H, W] to (height, width), pixel centres aligned; "bilinear" (antialiased) or "nearest"."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    mode = tv.InterpolationMode.BILINEAR if interpolation == "bilinear" else tv.InterpolationMode.NEAREST_EXACT
    return tv.resize(image, list(size), interpolation=mode, antialias=True)


def read_label(path: Path | str) -> Tensor:
    """Read stored class ids: int64 [H, W]. Palette images give their indices."""
    values = _to_channels(_read_array(Path(path), keep_palette=True), Path(path), "label", 1)[:, :, 0]
    if values.dtype.kind == "f":
        raise UserError(f"{path}: labels must be whole numbers, this file holds {values.dtype}")
    return torch.from_numpy(values.astype(np.int64))


def check_sizes(paths: dict[str, Path], images: dict[str, Tensor]) -> None:
    """Raise a UserError that names both files where two images differ in height or width."""
    (first, image), *others = images.items()
    for name, other in others:
        if other.shape[-2:] != image.shape[-2:]:
            (h, w), (other_h, other_w) = image.shape[-2:], other.shape[-2:]
            raise UserError(
                f"{paths[name]}: {name} is {other_h}x{other_w} (height x width), but {first} ({paths[first]}) is "
                f"{h}x{w}; all modalities must be aligned pixel by pixel"
            )


def _read_array(path: Path, keep_palette: bool) -> np.ndarray:
    """[H, W] or [H, W, C] as stored; .npy or any image file that Pillow reads."""
    try:
        with path.open("rb") as file:
            if path.suffix == ".npy":
                return np.lib.format.read_array(file, allow_pickle=False)
            with Image.open(file) as image:
                image.load()
                if image.mode == "P" and not keep_palette:
                    return np.asarray(image.convert("RGBA" if "transparency" in image.info else "RGB"))
                return np.asarray(image)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # decoders answer damage with a dozen different exceptions
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = "a NumPy array" if path.suffix == ".npy" else "an image"
        raise UserError(f"{path}: cannot be read as {what} ({reason}); the file may be damaged") from None


def _to_channels(values: np.ndarray, path: Path, kind: str, wanted: int) -> np.ndarray:
    """[H, W, wanted]; an opaque alpha channel is dropped, anything else that does not fit is an error."""
    if values.dtype == np.bool_:
        values = values.astype(np.uint8) if kind == "label" else values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind not in "uif" or values.ndim not in (2, 3) or values.size == 0:
        raise UserError(f"{path}: holds {values.dtype} of shape {values.shape}, {kind} wants numbers [H, W, {wanted}]")
    if values.ndim == 2:
        values = values[:, :, None]
    if wanted == 3 and values.shape[2] == 4 and values.dtype == np.uint8:
        if (values[:, :, 3] != 255).any():
            raise UserError(f"{path}: has a transparent alpha channel; save it as plain RGB (3 channels)")
        values = values[:, :, :3]
    if values.shape[2] != wanted:
        hint = "; store class ids, not colours" if kind == "label" else ""
        raise UserError(f"{path}: has {values.shape[2]} channel(s), {kind} needs {wanted}{hint}")
    return values


def _depth_metres(values: np.ndarray, path: Path, spec: ModalitySpec) -> Tensor:
    """Stored depth [H, W, 1] -> metres float32 [1, H, W], 0 = missing. Floating-point .npy files are metres already."""
    metres = np.array(values.transpose(2, 0, 1), dtype=np.float32, order="C")
    in_metres = path.suffix == ".npy" and values.dtype.kind == "f"
    if not np.isfinite(metres).all():
        count = int((~np.isfinite(metres)).sum())
        raise UserError(f"{path}: {count} depth values are NaN or infinite; write 0 where depth is missing")
    if not in_metres:
        missing = None if spec.missing_value is None else metres == spec.missing_value
        metres = metres * np.float32(spec.scale or spec.modality.scale or 1.0)
        if missing is not None:
            metres[missing] = 0.0
    if metres.min() < 0:
        raise UserError(f"{path}: holds depth below zero ({metres.min():g} m); write 0 where depth is missing")
    if not metres.any():
        raise UserError(f"{path}: holds no depth at all, every pixel is missing; leave out this frame, or the modality")
    return torch.from_numpy(metres)


def picture(image: Tensor, spec: ModalitySpec) -> np.ndarray:
    """Physical [C, H, W] -> uint8 [H, W, 3] for people: near depth is bright, missing depth is black."""
    values = image.numpy()
    if spec.kind == "rgb":
        return values.transpose(1, 2, 0).round().clip(0, 255).astype(np.uint8)
    if spec.kind == "normal":
        return ((values.transpose(1, 2, 0) + 1.0) * 127.5).round().clip(0, 255).astype(np.uint8)
    known = values[0] != 0 if spec.modality.missing is not None else np.ones_like(values[0], dtype=bool)
    low, high = np.percentile(values[0][known], (1, 99)) if known.any() else (0.0, 1.0)
    level = ((values[0] - low) / max(high - low, 1e-6)).clip(0, 1)
    if not spec.modality.colour_mapped:
        return np.repeat((values[0] * 255.0).round().clip(0, 255).astype(np.uint8)[:, :, None], 3, axis=2)
    bright = 1.0 - level if spec.kind == "depth" else level
    coloured = COLOUR_MAP[(bright * 255.0).round().astype(np.uint8)]
    return coloured * known[:, :, None].astype(np.uint8)


def oklch(lightness: np.ndarray, chroma: np.ndarray, hue_deg: np.ndarray) -> np.ndarray:
    """The perceptually uniform OKLCH colours -> sRGB uint8 [..., 3], clipped to what a screen shows."""
    hue = np.deg2rad(hue_deg)
    lab = np.stack(np.broadcast_arrays(lightness, chroma * np.cos(hue), chroma * np.sin(hue)), axis=-1)
    cones = lab @ np.array(
        [[1.0, 1.0, 1.0], [0.3963377774, -0.1055613458, -0.0894841775], [0.2158037573, -0.0638541728, -1.2914855480]]
    )
    linear = cones**3 @ np.array(
        [
            [4.0767416621, -1.2684380046, -0.0041960863],
            [-3.3077115913, 2.6097574011, -0.7034186147],
            [0.2309699292, -0.3413193965, 1.7076147010],
        ]
    )
    linear = linear.clip(0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (encoded * 255.0).round().astype(np.uint8)


# Lightness rises evenly, so equal steps of depth look equal, also in greyscale and to colour-blind eyes.
COLOUR_MAP = oklch(np.linspace(0.22, 0.93, 256), np.linspace(0.11, 0.13, 256), np.linspace(285.0, 95.0, 256))
