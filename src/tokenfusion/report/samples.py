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
from tokenfusion.report.run import ENSEMBLE, Run, Samples, View, one_line

SIDE, MAP_SIDE = 384, 264  # pixels of the longer side: inputs and predictions, exchange maps

Arrays = dict[str, NDArray[Any]]


class Picture(NamedTuple):
    """An image file (PNG or JPEG) with its place in the grid (from 1)."""

    data: bytes
    caption: str
    note: str
    column: int
    row: int


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
        pictures.append(_shown(index, target, "target", max(first, len(predictions)), 1))
    for place, (name, prediction) in enumerate(predictions.items(), 1):
        column, row = (first + 1, 1) if alone else (place, 2)
        pictures.append(_shown(index, prediction, f"{name}: prediction", column, row))
        if target is not None:
            column, row = (first + 2, 1) if alone else (place, 3)
            pictures.append(_errors(index, prediction, target, f"{name}: errors", column, row))
    return {
        "columns": max((picture.column for picture in pictures), default=1),
        "pictures": pictures,
        "legend": _legend(index, [array for array in (target, *predictions.values()) if array is not None]),
        "has_target": target is not None,
    }


def _exchanged(index: Samples, arrays: Arrays) -> View:
    """For every stream the chosen blocks' maps of exchanged tokens, on its own input; none where all are empty."""
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
    chosen = maps.chosen_blocks(list(scores))
    below = {block: maps.donor_below(exchanged[block]) for block, _, _ in chosen}
    streams: list[tuple[str, list[Picture]]] = []
    for place, name in enumerate(index.modalities):
        base = maps.shrink(_input(arrays, name), MAP_SIDE)
        pictures = []
        for block, column, row in chosen:
            where, both = exchanged[block][place], below[block]
            part = None if both is None else both[place]
            pictures.append(_picture(maps.overlay(base, where, part), block, column, row, _rate(where, part)))
        streams.append((name, pictures))
    return {
        "streams": streams,
        "stages": max(column for _, column, _ in chosen),
        "single": all(row == 1 for _, _, row in chosen),
        "below": len(index.modalities) == 2,
        "lowest": lowest,
    }


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
    note = "" if share is None else f"{100 * share:.1f} % " + ("wrong" if flat else "of the range off")
    errors = maps.error_map(maps.shrink(prediction, SIDE), maps.shrink(target, SIDE), index.ignore)
    return _picture(errors, caption, column, row, note, flat)


def _picture(image: maps.Bytes, caption: str, column: int, row: int, note: str = "", flat: bool = False) -> Picture:
    """Encode an image: flat colours as PNG, everything else as JPEG."""
    data = io.BytesIO()
    if flat:
        Image.fromarray(image).save(data, "PNG", optimize=True)
    else:
        Image.fromarray(image).save(data, "JPEG", quality=80, optimize=True)
    return Picture(data.getvalue(), caption, note, column, row)


def _legend(index: Samples, arrays: Iterable[NDArray[Any]]) -> list[tuple[str, str]]:
    """Name and colour of the classes that occur; empty where the arrays are images."""
    present = {int(label) for array in arrays if array.ndim == 2 for label in np.unique(array)}
    colours = css_colours(index.palette())
    legend = [(entry.name, colours[at]) for at, entry in enumerate(index.classes) if at in present]
    ignored = index.ignore is not None and index.ignore in present
    return [*legend, ("not counted", css_colours(np.array([maps.IGNORED], np.uint8))[0])] if ignored else legend
