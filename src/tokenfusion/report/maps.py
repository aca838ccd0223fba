"""Pictures of what a model did, as functions of arrays: exchanged tokens, labels and errors.

Three colours carry the meaning and stay apart for colour-blind readers, in grey print too: orange = substituted,
blue = substituted although the stand-in's own score is below the threshold, wine = wrong.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Bytes = NDArray[np.uint8]
Mask = NDArray[np.bool_]

SUBSTITUTED = (240, 150, 0)
DONOR_BELOW = (0, 84, 166)
WRONG = (136, 24, 78)
CORRECT = (226, 226, 224)
IGNORED = (40, 40, 40)
GRID_FROM = 6  # pixels: below this cell size the lines of the token grid would hide the picture


def exchange_map(scores: NDArray[Any], threshold: float) -> Mask:
    """Which tokens were substituted: those scored strictly below the threshold (Eq. 6), all with theta = 1.

    Args:
        scores: [M, h, w] in 0..1; half precision is compared in single precision.

    Raises:
        ValueError: where the scores are not [M, h, w] or leave 0..1.
    """
    if scores.ndim != 3:
        raise ValueError(f"scores have shape {list(scores.shape)}, wanted [M, h, w]")
    if not bool(np.all((scores >= 0) & (scores <= 1))):
        raise ValueError("scores leave 0..1")
    # theta = 1 substitutes every token, one whose score rounds to 1 too
    return np.asarray((scores.astype(np.float32) < np.float32(threshold)) | (threshold >= 1))


def donor_below(exchanged: Mask) -> Mask | None:
    """Substituted tokens whose stand-in is below the threshold too, or None where the stand-in is not known.

    Args:
        exchanged: [M, h, w]. With two streams the stand-in is the same position of the other one; with more it
            depends on the allocation, which the samples do not hold.
    """
    if exchanged.shape[0] != 2:
        return None
    return np.broadcast_to(exchanged.all(axis=0), exchanged.shape)


def upsample(cells: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """Each pixel takes the value of the cell that it lies in: [..., h, w] -> [..., height, width]."""
    rows = np.arange(height) * cells.shape[-2] // height
    columns = np.arange(width) * cells.shape[-1] // width
    return np.asarray(cells[..., rows[:, None], columns])


def checked_image(array: NDArray[Any]) -> Bytes:
    """The same array where it is an image, uint8 [H, W, 3].

    Raises:
        ValueError: where it is none.
    """
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"an image is {array.dtype} {list(array.shape)}, wanted uint8 [H, W, 3]")
    return array


def shrink(array: NDArray[Any], side: int) -> NDArray[Any]:
    """At most ``side`` pixels long: class ids [H, W] are picked, images [H, W, 3] averaged."""
    scale = min(1.0, side / max(array.shape[:2]))
    height, width = (max(round(size * scale), 1) for size in array.shape[:2])
    if array.ndim == 2:
        return upsample(array, height, width)
    return np.asarray(Image.fromarray(array).resize((width, height), Image.Resampling.LANCZOS))


def enlarge(image: Bytes, side: int) -> Bytes:
    """Every pixel as a square, as large as a longer side of ``side`` pixels allows; a large image stays as it is."""
    factor = max(side // max(image.shape[:2]), 1)
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def overlay(image: Bytes, exchanged: Mask, below: Mask | None = None) -> Bytes:
    """Paint the substituted tokens of one stream over its own input, which turns grey.

    Args:
        image: uint8 [H, W, 3].
        exchanged: [h, w], any grid. The grid is drawn where its cells are large enough to be seen.
        below: [h, w], the part of ``exchanged`` that gets the second colour.
    """
    height, width = image.shape[:2]
    grey = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    grey = 40 + 0.78 * grey  # lifted blacks: the tint stays visible on dark frames
    picture = np.repeat(grey[..., None], 3, axis=2)
    picture = _tint(picture, upsample(exchanged, height, width), SUBSTITUTED)
    if below is not None:
        picture = _tint(picture, upsample(exchanged & below, height, width), DONOR_BELOW, under=grey)
    lines = _grid(height, width, *exchanged.shape)
    picture[lines] = 0.6 * picture[lines] + 0.4 * 255
    return picture.round().clip(0, 255).astype(np.uint8)


def _tint(
    picture: NDArray[np.float32], where: Mask, colour: tuple[int, int, int], under: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    base = picture if under is None else np.repeat(under[..., None], 3, axis=2)
    mixed = 0.38 * base + 0.62 * np.array(colour, np.float32)
    return np.where(where[..., None], mixed, picture).astype(np.float32)


def _grid(height: int, width: int, rows: int, columns: int) -> Mask:
    """The pixels on a border between cells; none where the cells are small."""
    if min(height / rows, width / columns) < GRID_FROM:
        return np.zeros((height, width), bool)
    row = np.arange(height) * rows // height
    column = np.arange(width) * columns // width
    return np.asarray((np.diff(row, prepend=0) > 0)[:, None] | (np.diff(column, prepend=0) > 0)[None, :])


def bands(blocks: Sequence[str]) -> list[list[str]]:
    """The blocks by the word that their names begin with: of ``enc1.0`` and ``dec1.0`` encoder and decoder apart."""
    found: dict[str, list[str]] = {}
    for block in blocks:
        found.setdefault(block.partition(".")[0].rstrip("0123456789"), []).append(block)
    return list(found.values())


def chosen_blocks(blocks: Sequence[str]) -> list[tuple[str, int, int]]:
    """The first and the last block of each stage as (name, column, row), from 1; four of a network without stages.

    A block is called ``stage.number``; the stages become columns.
    """
    stages: dict[str, list[str]] = {}
    for block in blocks:
        stages.setdefault(block.rpartition(".")[0], []).append(block)
    if len(stages) == 1:
        places = sorted({round(part * (len(blocks) - 1) / 3) for part in range(4)})
        return [(blocks[place], column, 1) for column, place in enumerate(places, 1)]
    return [
        (name, column, row)
        for column, names in enumerate(stages.values(), 1)
        for row, name in enumerate(dict.fromkeys((names[0], names[-1])), 1)
    ]


def palette(colours: Sequence[Sequence[int] | None]) -> Bytes:
    """Colours of the classes [K, 3]; classes without one get one, spread over the hues."""
    table = np.zeros((len(colours), 3), np.uint8)
    for index, colour in enumerate(colours):
        if colour is None:
            hue, level = (index * 0.618034) % 1.0, (0.62, 0.42, 0.76, 0.52)[index % 4]
            colour = [round(255 * part) for part in colorsys.hls_to_rgb(hue, level, 0.55)]
        table[index] = colour
    return table


def colour_labels(labels: NDArray[Any], colours: Bytes, ignore: int | None = 255) -> Bytes:
    """Class ids [H, W] -> picture [H, W, 3]; ignored pixels are nearly black.

    Raises:
        ValueError: where an id has no colour.
    """
    ignored = np.zeros(labels.shape, bool) if ignore is None else labels == ignore
    unknown = labels[(labels >= len(colours)) & ~ignored]
    if unknown.size:
        raise ValueError(f"class id {int(unknown.max())} occurs, but only {len(colours)} classes are known")
    table = np.vstack([colours, np.array(IGNORED, np.uint8)])
    return np.asarray(table[np.where(ignored, len(colours), labels)])


def error_map(prediction: Bytes, target: Bytes, ignore: int | None = 255) -> Bytes:
    """Where the prediction differs from the target: pale = right, wine = wrong, nearly black = ignored.

    Args:
        prediction: class ids [H, W], or an image [H, W, 3] whose absolute difference, the mean over its channels, is
            shaded.
        target: of the same shape.

    Raises:
        ValueError: where the shapes differ.
    """
    _same_shape(prediction, target)
    if prediction.ndim == 3:
        difference = np.abs(prediction.astype(np.float32) - target.astype(np.float32)).mean(axis=2, keepdims=True)
        share = np.minimum(difference / 64, 1)  # a quarter of the range is as wrong as it gets
    else:
        share = (prediction != target).astype(np.float32)[..., None]
    picture = (1 - share) * np.array(CORRECT, np.float32) + share * np.array(WRONG, np.float32)
    if prediction.ndim == 2 and ignore is not None:
        picture[target == ignore] = IGNORED
    return picture.round().astype(np.uint8)


def error_share(prediction: Bytes, target: Bytes, ignore: int | None = 255) -> float | None:
    """Share of the counted pixels that are wrong; for images the mean absolute difference over 255.

    Raises:
        ValueError: where the shapes differ.
    """
    _same_shape(prediction, target)
    if prediction.ndim == 3:
        return float(np.abs(prediction.astype(np.float32) - target.astype(np.float32)).mean() / 255)
    counted = np.ones(target.shape, bool) if ignore is None else target != ignore
    return float((prediction != target)[counted].mean()) if counted.any() else None


def _same_shape(prediction: Bytes, target: Bytes) -> None:
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {list(prediction.shape)} and target {list(target.shape)} differ in shape")
