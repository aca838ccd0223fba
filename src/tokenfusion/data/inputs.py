"""The two forms in which networks take images: normalised, or coded into tanh's range -1..1."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from tokenfusion.data.modality import ModalitySpec


def prepare_inputs(
    raw: dict[str, Tensor],
    specs: dict[str, ModalitySpec],
    resize: tuple[int, int] | None = None,
    as_tanh: bool = False,
) -> dict[str, Tensor]:
    """Physical images -> what the network takes: {name: float32 [3, H, W]}, resized to (height, width) where given.

    With ``as_tanh`` the values lie in -1..1 (``to_tanh``), as translation takes them; else they are normalised.
    Evaluation and prediction both go through here, so that their inputs are equal to the bit.
    """
    if resize is not None:
        raw = {name: resize_image(image, resize, specs[name].modality.interpolation) for name, image in raw.items()}
    if as_tanh:
        return {name: to_tanh(image, specs[name]) for name, image in raw.items()}
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


def to_tanh(image: Tensor, spec: ModalitySpec) -> Tensor:
    """Physical [C, H, W] -> float32 [3, H, W] in -1..1, linear over ``spec.limits``; what lies outside is clipped.

    Depth d with limits (near, far) becomes 2 ln(1 + d/near) / ln(1 + far/near) - 1: fine steps where it is near, and
    missing depth (0) becomes -1. One-channel kinds are tiled.
    """
    low, high = spec.limits
    if spec.kind == "depth":
        level = torch.log1p(image / low) / math.log1p(high / low)
    else:
        level = (image - low) / (high - low)
    return (2.0 * level - 1.0).clamp(-1.0, 1.0).expand(3, -1, -1).contiguous()


def from_tanh(coded: Tensor, spec: ModalitySpec) -> Tensor:
    """The inverse of ``to_tanh``: [3, H, W] in -1..1 -> physical float32 [C, H, W].

    One-channel kinds are the mean of the three channels; normals are brought back to unit length, zero stays zero.
    """
    low, high = spec.limits
    coded = coded.float().clamp(-1.0, 1.0)
    if spec.modality.stored == 1:
        coded = coded.mean(dim=0, keepdim=True)
    level = (coded + 1.0) / 2.0
    if spec.kind == "depth":
        return low * torch.expm1(level * math.log1p(high / low))
    physical = low + level * (high - low)
    return F.normalize(physical, dim=0) if spec.modality.is_vector else physical


def resize_image(image: Tensor, size: Sequence[int], interpolation: str) -> Tensor:
    """Resize [C, H, W] to (height, width), pixel centres aligned; "bilinear" (antialiased) or "nearest"."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    mode = tv.InterpolationMode.BILINEAR if interpolation == "bilinear" else tv.InterpolationMode.NEAREST_EXACT
    return tv.resize(image, list(size), interpolation=mode, antialias=True)
