"""Pictures of a run's samples: inputs, target, predictions and errors, and the tokens that were exchanged."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenfusion.errors import UserError
from tokenfusion.report import maps, plots
from tokenfusion.report.rows import ENSEMBLE
from tokenfusion.report.run import Run, Samples, View, one_line

SIDE, MAP_SIDE = 384, 264  # pixels of the longer side: inputs and predictions, exchange maps
SMALL = 192  # pixels of the longer side: pages show such images enlarged

Arrays = dict[str, NDArray[Any]]


class Picture(NamedTuple):
    """An image file (PNG or JPEG) with its place in the grid (from 1)."""

    data: bytes
    caption: str
    note: str
    column: int
    row: int
    crisp: bool = False  # so small that its pixels are shown as squares


class Band(NamedTuple):
    """Maps of exchanged tokens that form one grid; ``single`` where it has one row."""

    pictures: list[Picture]
    single: bool


def sample(run: Run, name: str) -> View:
    """Everything to show of one sample.

    Raises:
        UserError: where its file is missing or damaged, or does not fit ``index.json``.
    """
    if ".." in Path(name).parts or Path(name).is_absolute():
        raise UserError(f"{run.path / 'samples' / 'index.json'}: id {name!r} leads out of the folder; take it out")
    path = run.path / "samples" / f"{name}.npz"
    arrays = _arrays(path)
    try:
        return {"id": name, **_results(run.samples, arrays), **_exchanged(run.samples, arrays)}
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{path}: {one_line(error)}; run `tokenfusion eval` again") from None


def css_colours(colours: maps.Bytes) -> list[str]:
    """Colours [K, 3] as a style sheet writes them."""
    return ["#" + bytes(colour).hex() for colour in colours]


def _arrays(path: Path) -> Arrays:
    if not path.is_file():
        raise UserError(f"{path}: index.json names this sample, but the file is missing; run `tokenfusion eval` again")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: is damaged ({one_line(error)}); run `tokenfusion eval` again") from None


def _results(index: Samples, arrays: Arrays) -> View:
    """Rows of pictures whose columns are the streams: inputs and target, predictions, errors."""
    if finished := _under(arrays, "picture/"):
        return _finished(finished)
    inputs, predictions = _under(arrays, "input/"), _under(arrays, "prediction/")
    if len(index.modalities) == 1:
        predictions.pop(ENSEMBLE, None)  # the only stream once more
    target = arrays.get("target")
    first = len(inputs) + (target is not None)
    alone = len(predictions) == 1  # everything goes into one row
    pictures = [
        _picture(maps.shrink(_input(arrays, name), SIDE), name, column, 1) for column, name in enumerate(inputs, 1)
    ]
    if target is not None:
        name = f"{index.target}: truth" if index.target else "target"
        pictures.append(_shown(index, target, name, max(first, len(predictions)), 1))
    for place, (name, prediction) in enumerate(predictions.items(), 1):
        column, row = (first + 1, 1) if alone else (place, 2)
        pictures.append(_shown(index, prediction, f"{name}: prediction", column, row))
        if target is not None:
            column, row = (first + 2, 1) if alone else (place, 3)
            pictures.append(_errors(index, prediction, target, f"{name}: errors", column, row))
    return {
        "columns": max((picture.column for picture in pictures), default=1),
        "grid": "matrix",
        "pictures": pictures,
        "legend": _legend(index, [array for array in (target, *predictions.values()) if array is not None]),
        "has_target": target is not None,
        "shaded": target is not None and target.ndim == 3,
    }


def _finished(pictures: Arrays) -> View:
    """Pictures that a task has drawn to the end: side by side."""
    shown = [
        Picture(_smallest(maps.checked_image(array)), name, "", column, 1)
        for column, (name, array) in enumerate(pictures.items(), 1)
    ]
    return {
        "columns": len(shown),
        "grid": "gallery",
        "pictures": shown,
        "legend": [],
        "has_target": True,
        "shaded": False,
    }


def _exchanged(index: Samples, arrays: Arrays) -> View:
    """For every stream the chosen blocks' maps of exchanged tokens, on its own input; none where all are empty.

    A band of them for each part of the network: encoder, decoder.
    """
    scores = {block: arrays[f"scores/{block}"] for block in index.blocks if f"scores/{block}" in arrays}
    if index.threshold is None or not scores:
        return {"streams": [], "below": False, "lowest": None}
    exchanged = {block: maps.exchange_map(score, index.threshold) for block, score in scores.items()}
    for block, found in exchanged.items():
        if len(found) != len(index.modalities):
            raise ValueError(f"scores/{block} has {len(found)} streams, index.json {len(index.modalities)}")
    lowest = min(float(score.min()) for score in scores.values())
    if not any(found.any() for found in exchanged.values()):
        return {"streams": [], "below": False, "lowest": lowest}
    chosen = [maps.chosen_blocks(band) for band in maps.bands(list(scores))]
    streams: list[tuple[str, list[Band]]] = []
    for place, name in enumerate(index.modalities):
        base = maps.enlarge(maps.shrink(_input(arrays, name), MAP_SIDE), MAP_SIDE)
        streams.append((name, [_band(base, exchanged, place, band) for band in chosen]))
    return {
        "streams": streams,
        "stages": max(column for band in chosen for _, column, _ in band),
        "below": len(index.modalities) == 2,
        "lowest": lowest,
    }


def _band(base: maps.Bytes, exchanged: dict[str, maps.Mask], place: int, chosen: list[tuple[str, int, int]]) -> Band:
    """The maps of one stream over some blocks."""
    pictures = []
    for block, column, row in chosen:
        where, both = exchanged[block][place], maps.donor_below(exchanged[block])
        part = None if both is None else both[place]
        pictures.append(_picture(maps.overlay(base, where, part), block, column, row, _rate(where, part)))
    return Band(pictures, all(row == 1 for _, _, row in chosen))


def _rate(exchanged: maps.Mask, below: maps.Mask | None) -> str:
    text = f"{plots.percent(exchanged.mean())} %"
    if below is None or not exchanged.any():
        return text
    return f"{text}, {plots.percent(below.sum() / exchanged.sum())} % of them blue"


def _input(arrays: Arrays, name: str) -> maps.Bytes:
    if f"input/{name}" not in arrays:
        raise ValueError(f"holds no input/{name}")
    return maps.checked_image(arrays[f"input/{name}"])


def _under(arrays: Arrays, prefix: str) -> Arrays:
    """The arrays below a prefix, the ensemble last."""
    found = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    return {name: found[name] for name in sorted(found, key=lambda name: name == ENSEMBLE)}


def _shown(index: Samples, array: NDArray[Any], caption: str, column: int, row: int) -> Picture:
    """Class ids in their colours, or an image as it is."""
    if array.ndim != 2:
        return _picture(maps.shrink(maps.checked_image(array), SIDE), caption, column, row)
    colours = maps.colour_labels(maps.shrink(array, SIDE), index.palette(), index.ignore)
    return _picture(colours, caption, column, row, flat=True)


def _errors(
    index: Samples, prediction: NDArray[Any], target: NDArray[Any], caption: str, column: int, row: int
) -> Picture:
    flat = prediction.ndim == 2
    share = maps.error_share(prediction, target, index.ignore)
    note = "" if share is None else f"{100 * share:.1f} % wrong" if flat else f"colours {100 * share:.1f} % off"
    errors = maps.error_map(maps.shrink(prediction, SIDE), maps.shrink(target, SIDE), index.ignore)
    return _picture(errors, caption, column, row, note, flat)


def _picture(image: maps.Bytes, caption: str, column: int, row: int, note: str = "", flat: bool = False) -> Picture:
    """Encode an image: flat colours as PNG, everything else as JPEG."""
    data = io.BytesIO()
    crisp = max(image.shape[:2]) <= SMALL
    if flat:
        Image.fromarray(image).save(data, "PNG", optimize=True)
    elif crisp:  # enlarged, the marks of a stronger compression would show
        Image.fromarray(image).save(data, "JPEG", quality=92, subsampling=0, optimize=True)
    else:
        Image.fromarray(image).save(data, "JPEG", quality=80, optimize=True)
    return Picture(data.getvalue(), caption, note, column, row, crisp)


def _smallest(image: maps.Bytes) -> bytes:
    """A picture with lines and names that stay sharp: PNG, or JPEG where a photograph lies below them."""
    png, jpeg = io.BytesIO(), io.BytesIO()
    Image.fromarray(image).save(png, "PNG", optimize=True)
    Image.fromarray(image).save(jpeg, "JPEG", quality=92, subsampling=0, optimize=True)
    return min(png.getvalue(), jpeg.getvalue(), key=len)


def _legend(index: Samples, arrays: Iterable[NDArray[Any]]) -> list[tuple[str, str]]:
    """Name and colour of the classes that occur; empty where the arrays are images."""
    present = {int(label) for array in arrays if array.ndim == 2 for label in np.unique(array)}
    colours = css_colours(index.palette())
    legend = [(entry.name, colours[at]) for at, entry in enumerate(index.classes) if at in present]
    ignored = index.ignore is not None and index.ignore in present
    return [*legend, ("not counted", css_colours(np.array([maps.IGNORED], np.uint8))[0])] if ignored else legend
