"""Joint augmentation of all modalities and the target, and the frames that training and evaluation draw."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as tv

from tokenfusion.data.folder import IGNORE, Folder
from tokenfusion.data.modality import ModalitySpec, decode, normalise, prepare_inputs, resize_image
from tokenfusion.errors import UserError


class Frame(NamedTuple):
    """One sample: normalised inputs {name: float32 [3, H, W]} and target int64 [H, W] (255 = ignore) or None."""

    id: str
    inputs: dict[str, Tensor]
    target: Tensor | None


class Batch(NamedTuple):
    """Frames stacked: inputs {name: [B, 3, H, W]}, target [B, H, W] or None."""

    ids: list[str]
    inputs: dict[str, Tensor]
    target: Tensor | None


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
    return (mean / (spec.scale or modality.scale or 1.0 / 255.0)).round().clamp(0, 255)


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


class Frames(Dataset[Frame]):
    """A split of a folder as normalised frames; item = pure function of (seed, epoch, index).

    With ``augment`` None the frame is what evaluation sees: the whole image, its inputs resized to ``resize``
    (height, width) where given, its target at its own size. ``set_epoch`` reaches running DataLoader workers.

    Errors: UserError for an unknown split or modality, and at once where files of the split are missing.
    """

    def __init__(
        self,
        folder: Folder,
        split: str,
        modalities: Sequence[str],
        augment: Augment | None = None,
        seed: int = 0,
        resize: tuple[int, int] | None = None,
    ) -> None:
        self.folder, self.augment, self.seed, self.resize = folder, augment, seed, resize
        self.ids = folder.ids(split)
        self.specs = folder.select(modalities)
        if augment is not None and resize is not None:
            raise UserError("resize is for frames without augmentation; set augment.resize instead")
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change
        self._check_files(split)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Frame:
        id = self.ids[index]
        target = self.folder.read_target(id) if self.folder.has_target else None
        if self.augment is None:
            raw = self.folder.read(id, list(self.specs))
            self._check_target(id, raw, target)
            return Frame(id, prepare_inputs(raw, self.specs, self.resize), target)
        images = self.folder.load(id, list(self.specs))
        self._check_target(id, images, target)
        images, target = self.augment(images, target, self.specs, self._generator(index % len(self.ids)))
        raw = {name: decode(image, self.specs[name]) for name, image in images.items()}
        return Frame(id, normalise(raw, self.specs), target)

    def _generator(self, index: int) -> torch.Generator:
        key = f"{self.seed}/{int(self._epoch)}/{index}".encode()
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:4], "little"))

    def _check_target(self, id: str, images: dict[str, Tensor], target: Tensor | None) -> None:
        name, image = next(iter(images.items()))
        if target is not None and target.shape != image.shape[-2:]:
            (h, w), (image_h, image_w) = target.shape, image.shape[-2:]
            raise UserError(
                f"{self.folder.target_path(id)}: the target is {h}x{w} (height x width), but {name} "
                f"({self.folder.image_path(id, name)}) is {image_h}x{image_w}; both must be aligned"
            )

    def _check_files(self, split: str) -> None:
        """A missing file should stop a run before its first step, not in its last hour."""
        paths = [self.folder.image_path(id, name) for id in self.ids for name in self.specs]
        if self.folder.has_target:
            paths += [self.folder.target_path(id) for id in self.ids]
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise UserError(f"{missing[0]}: no such file; split {split!r} lacks {len(missing)} of {len(paths)} files")


def collate(frames: Sequence[Frame]) -> Batch:
    """Stack frames of one size.

    Errors: UserError that names two frames whose sizes differ.
    """
    first = frames[0]
    for frame in frames:
        for name, image in frame.inputs.items():
            if image.shape != first.inputs[name].shape:
                raise UserError(
                    f"frames {first.id!r} {list(first.inputs[name].shape)} and {frame.id!r} {list(image.shape)} differ "
                    f"in size ({name}); use batches of 1, a crop or a resize"
                )
    inputs = {name: torch.stack([frame.inputs[name] for frame in frames]) for name in first.inputs}
    targets = [frame.target for frame in frames if frame.target is not None]
    return Batch([frame.id for frame in frames], inputs, torch.stack(targets) if targets else None)
