"""Frames that training and evaluation draw from a folder, and their batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tokenfusion.data.augment import Augment
from tokenfusion.data.chance import seeded
from tokenfusion.data.degrade import PLAIN, Conditions, degraded
from tokenfusion.data.folder import Folder
from tokenfusion.data.image import decode, measured
from tokenfusion.data.inputs import prepare_inputs, resize_image
from tokenfusion.errors import UserError


class Frame(NamedTuple):
    """One sample: inputs {name: float32 [3, H, W]} and target, or None where there is none.

    Segmentation: normalised inputs, target int64 [H, W] (255 = ignore). Translation: inputs and target in -1..1, target
    float32 [3, H, W], valid bool [1, H, W]: where the target was measured and is no padding.
    """

    id: str
    inputs: dict[str, Tensor]
    target: Tensor | None
    valid: Tensor | None = None


class Batch(NamedTuple):
    """Frames stacked: inputs {name: [B, 3, H, W]}; target [B, H, W] or [B, 3, H, W] and valid [B, 1, H, W], or None."""

    ids: list[str]
    inputs: dict[str, Tensor]
    target: Tensor | None
    valid: Tensor | None = None


class Frames(Dataset[Frame]):
    """A split of a folder as frames; item = pure function of (seed, epoch, index).

    With ``augment`` None the frame is what evaluation sees: the whole image, its inputs resized to ``resize``
    (height, width) where given, its label target at its own size. ``set_epoch`` reaches running DataLoader workers.
    With ``target``, the name of one more modality, frames are those of translation: the folder's labels are not read,
    inputs and target come in -1..1, and ``resize`` is for both. ``conditions`` say which inputs evaluation leaves out, and what
    befalls the others.

    Errors: UserError for an unknown split or modality, for a target that is an input as well or that the augmentation
    would recolour, for conditions that do not fit the modalities, and at once where files of the split are missing.
    """

    def __init__(
        self,
        folder: Folder,
        split: str,
        modalities: Sequence[str],
        augment: Augment | None = None,
        seed: int = 0,
        resize: tuple[int, int] | None = None,
        target: str | None = None,
        conditions: Conditions = PLAIN,
    ) -> None:
        self.folder, self.augment, self.seed, self.resize, self.target = folder, augment, seed, resize, target
        self.ids = folder.ids(split)
        self.conditions = conditions
        inputs = conditions.given({name: spec.kind for name, spec in folder.select(modalities).items()})
        self.specs = folder.select([*inputs, target] if target else inputs)
        self.labelled = folder.has_target and target is None
        if augment is not None and resize is not None:
            raise UserError("resize is for frames without augmentation; set augment.resize instead")
        if target in modalities:
            raise UserError(f"data.target is {target!r}, which is among data.modalities too; choose another target")
        if target and augment is not None and augment.jitter > 0 and self.specs[target].kind == "rgb":
            raise UserError(
                f"augment.jitter is {augment.jitter}, but it would recolour the target {target!r}; set it to 0"
            )
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change
        self._check_files(split)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Frame:
        id = self.ids[index]
        if self.target is not None:
            return self._translation(id, index, self.target)
        target = self.folder.read_target(id) if self.labelled else None
        if self.augment is None:
            raw = self.folder.read(id, list(self.specs))
            self._check_target(id, raw, target)
            return Frame(id, prepare_inputs(self._degraded(id, raw), self.specs, self.resize), target)
        images = self.folder.load(id, list(self.specs))
        self._check_target(id, images, target)
        images, target = self.augment(images, target, self.specs, self._generator(index))
        raw = {name: decode(image, self.specs[name]) for name, image in images.items()}
        return Frame(id, prepare_inputs(raw, self.specs), target)

    def _translation(self, id: str, index: int, name: str) -> Frame:
        images = self.folder.load(id, list(self.specs))
        known = measured(images[name], self.specs[name]).to(torch.uint8)
        if self.augment is None:
            valid = resize_image(known[None], self.resize or known.shape, "nearest")
        else:
            images, moved = self.augment(images, known, self.specs, self._generator(index))
            assert moved is not None  # a map that went in comes out
            valid = moved[None]
        raw = {key: decode(image, self.specs[key]) for key, image in images.items()}
        coded = prepare_inputs(self._degraded(id, raw), self.specs, self.resize, as_tanh=True)
        return Frame(id, coded, coded.pop(name), valid == 1)  # padding is 255

    def _degraded(self, id: str, raw: dict[str, Tensor]) -> dict[str, Tensor]:
        worse = self.conditions.degrade
        return {n: degraded(x, self.specs[n], worse[n], id, n) if n in worse else x for n, x in raw.items()}

    def _generator(self, index: int) -> torch.Generator:
        return seeded(self.seed, int(self._epoch), index % len(self.ids))

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
        if self.labelled:
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
    valid = [frame.valid for frame in frames if frame.valid is not None]
    ids = [frame.id for frame in frames]
    return Batch(ids, inputs, torch.stack(targets) if targets else None, torch.stack(valid) if valid else None)
