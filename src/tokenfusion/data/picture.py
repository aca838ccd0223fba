"""Pictures for people: any modality as uint8 colours."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from tokenfusion.data.modality import ModalitySpec


def picture(image: Tensor, spec: ModalitySpec, like: Tensor | None = None) -> np.ndarray:
    """Physical [C, H, W] -> uint8 [H, W, 3] for people: near depth is bright, missing depth is black.

    Colours span the image's own range, or that of ``like``, so that two pictures can be compared.
    """
    values = image.numpy()
    if spec.kind == "normal":
        return ((values.transpose(1, 2, 0) + 1.0) * 127.5).round().clip(0, 255).astype(np.uint8)
    if spec.modality.stored == 3:
        stored = values.transpose(1, 2, 0) / (spec.modality.scale or 1.0) + spec.modality.zero
        return stored.round().clip(0, 255).astype(np.uint8)
    known = values[0] != 0 if spec.modality.missing is not None else np.ones_like(values[0], dtype=bool)
    measure = image if like is None else like
    span = measure[0][measure[0] != 0] if spec.modality.missing is not None else measure[0]
    low, high = np.percentile(span.numpy(), (1, 99)) if span.numel() else (0.0, 1.0)
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
