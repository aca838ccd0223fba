"""Joint augmentation of all modalities and the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from tokenfusion.data.folder import IGNORE
from tokenfusion.data.inputs import resize_image
from tokenfusion.data.modality import ModalitySpec
from tokenfusion.errors import UserError


class Window(NamedTuple):
    """The part of the source that is cut out, the size it is resized to, and where it lies in the output."""

    source: tuple[int, int, int, int]  # top, left, height, width
    size: tuple[int, int]
    output: tuple[int, int]
    place: tuple[int, int]  # top, left


@dataclass(frozen=True)
class Augment:
    """Random scale, crop and flip of all modalities together, and colour changes of rgb alone.

    What the crop asks for beyond the image is padded: rgb with its mean, depth with 0 = missing, the target with 255.

    Args:
        crop: (height, width) of the result; None keeps the whole scaled image.
        scale: range of the random scale, evenly drawn.
        flip: probability of a horizontal flip; normals turn with it.
        jitter: brightness, contrast and saturation of rgb vary by up to this share.
        resize: (height, width) that every image is brought to before all else.
        shorter: the shorter side is never scaled below this many pixels.
    """

    crop: tuple[int, int] | None = None
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    jitter: float = 0.0
    resize: tuple[int, int] | None = None
    shorter: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise UserError(f"augment.scale is {list(self.scale)}; wanted [low, high] with 0 < low <= high")
        if not 0 <= self.flip <= 1 or not 0 <= self.jitter < 1:
            raise UserError(f"augment.flip {self.flip} and augment.jitter {self.jitter} must lie in 0..1")
        for key, size in (("crop", self.crop), ("resize", self.resize)):
            if size is not None and (len(size) != 2 or min(size) < 1):
                raise UserError(f"augment.{key} is {list(size)}; wanted [height, width] in pixels")

    def __call__(
        self,
        images: dict[str, Tensor],
        target: Tensor | None,
        specs: dict[str, ModalitySpec],
        generator: torch.Generator,
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Transform images in their working form [C, H, W] and the target [H, W]; all draws come from ``generator``."""
        draws = torch.rand(9, generator=generator).tolist()  # always as many: no draw moves the next one
        height, width = next(iter(images.values())).shape[-2:]
        window = self._window(height, width, draws[:5])
        flip = draws[5] < self.flip
        results = {}
        for name, image in images.items():
            spec = specs[name]
            result = _cut(image, window, spec.modality.interpolation, _padding(image, spec))
            if flip:
                result = _flip(result, spec.modality.is_vector)
            if self.jitter > 0 and spec.kind == "rgb":
                result = _recolour(result, [1.0 + self.jitter * (2.0 * draw - 1.0) for draw in draws[6:]])
            results[name] = result
        if target is not None:
            target = _cut(target[None], window, "nearest", torch.tensor([IGNORE]))[0]
            target = target.flip(-1) if flip else target
        return results, target

    def _window(self, height: int, width: int, draws: list[float]) -> Window:
        """Cut first, resize after: only the pixels that are kept are ever resampled."""
        base_h, base_w = self.resize or (height, width)
        scale = self.scale[0] + (self.scale[1] - self.scale[0]) * draws[0]
        scale = max(scale, self.shorter / min(base_h, base_w))
        (top, source_h, out_h, crop_h, place_top), (left, source_w, out_w, crop_w, place_left) = (
            _along(length, scale * base, crop, draw, place_draw)
            for length, base, crop, draw, place_draw in (
                (height, base_h, self.crop[0] if self.crop else None, draws[1], draws[3]),
                (width, base_w, self.crop[1] if self.crop else None, draws[2], draws[4]),
            )
        )
        return Window((top, left, source_h, source_w), (out_h, out_w), (crop_h, crop_w), (place_top, place_left))


def _along(length: int, scaled: float, crop: int | None, draw: float, place_draw: float) -> tuple[int, ...]:
    """One axis: offset and extent in the source, extent after resizing, extent of the output, offset in the output."""
    virtual = max(1, round(scaled))
    output = virtual if crop is None else crop
    kept = min(output, virtual)
    source = length if kept == virtual else min(length, max(1, round(kept * length / virtual)))
    return int(draw * (length - source + 1)), source, kept, output, int(place_draw * (output - kept + 1))


def _cut(image: Tensor, window: Window, interpolation: str, padding: Tensor) -> Tensor:
    """[C, H, W] -> [C, h, w] of the window; outside the image stands ``padding`` [C]."""
    top, left, height, width = window.source
    part = image[:, top : top + height, left : left + width]
    part = resize_image(part, window.size, interpolation)
    if window.size == window.output:
        return part
    result = padding.to(image.dtype).view(-1, 1, 1).repeat(1, *window.output)
    top, left = window.place
    result[:, top : top + part.shape[1], left : left + part.shape[2]] = part
    return result


def _padding(image: Tensor, spec: ModalitySpec) -> Tensor:
    """What stands outside the image, in its working form: 0 for depth and normals (no measurement), else the mean."""
    modality = spec.modality
    if modality.missing is not None or modality.is_vector:
        return torch.zeros(image.shape[0])
    mean = torch.tensor(spec.mean or modality.mean)[: image.shape[0]]
    if image.dtype != torch.uint8:
        return mean
    return (mean / (spec.scale or modality.scale or 1.0 / 255.0) + modality.zero).round().clamp(0, 255)


def _flip(image: Tensor, is_vector: bool) -> Tensor:
    """Mirror left and right; a vector's x component (channel 0) changes its sign."""
    image = image.flip(-1)
    if is_vector and image.dtype == torch.uint8:  # stored (n + 1) / 2 x 255; black = no surface stays black
        image[0] = torch.where((image != 0).any(dim=0), 255 - image[0], image[0])
    elif is_vector:
        image[0].neg_()
    return image


def _recolour(image: Tensor, factors: Sequence[float]) -> Tensor:
    image = tv.adjust_brightness(image, factors[0])
    image = tv.adjust_contrast(image, factors[1])
    return tv.adjust_saturation(image, factors[2])
